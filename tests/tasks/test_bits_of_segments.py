"""Bits per byte of samples of several segments: each is measured alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm.data.pack.job import pack
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.registry import NETWORKS, TASKS
from mm.tasks.bits_per_byte import uniform_nats
from mm.tokenizers.image.patches import ImagePatchesConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.vocabulary import extend_vocabulary

TEXT = BytesConfig(modality="text").build()


@pytest.fixture(scope="module")
def generator() -> Generator:
    vocabulary = extend_vocabulary([TEXT.spec])
    torch.manual_seed(0)
    backbone = {"kind": "stack", "depth": 1}
    model = NETWORKS.parse({"kind": "lm", "d_model": 16, "backbone": backbone}).build(vocabulary)
    init_weights(model)
    return Generator(model.eval(), vocabulary, {"text": TEXT})


def packed(root: Path, *samples: list[str]) -> Path:
    lines = [
        {"key": str(i), "split": "test", "segments": [{"text": t} for t in texts]}
        for i, texts in enumerate(samples)
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pack(root / "rows.jsonl", root / "packed", progress=False)
    return root / "packed"


def test_every_segment_counts_alone(generator: Generator, tmp_path: Path) -> None:
    data = packed(tmp_path, ["abc", "de"], ["f"])
    task = TASKS.parse({"kind": "bits_per_byte", "data": data, "split": "test"}).build()
    figures = task.evaluate(generator)
    assert figures["text_n"] == 3 and figures["text_bytes"] == 6
    assert figures["text_tokens"] == 9, "each has an end"
    chance = sum(uniform_nats(n, TEXT.spec) for n in (3, 2, 1)) / math.log(2) / 6
    assert figures["text_bits_per_byte_chance"] == pytest.approx(chance)
    few = TASKS.parse(task.to_dict() | {"limit": 2}).build().evaluate(generator)
    assert few["text_n"] == 2 and few["text_bytes"] == 4, "the first and the last"


def test_values_have_no_bits(tmp_path: Path) -> None:
    """Left out where nothing is asked for, refused by name where they are."""
    pixels = ImagePatchesConfig(modality="image", patch=4).build()
    vocabulary = extend_vocabulary([TEXT.spec, pixels.spec])
    config = {"kind": "lm", "d_model": 16, "backbone": {"kind": "stack", "depth": 1}}
    config["adapters"] = {"image": {"kind": "linear", "d_in": 48}}
    model = NETWORKS.parse(config).build(vocabulary)
    init_weights(model)
    tokenizers = {"text": TEXT, "image": pixels}
    (tmp_path / "files").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "files" / "a.png")
    (tmp_path / "files" / "a.txt").write_text("abc")
    data = {"kind": "bits_per_byte", "data": tmp_path / "packed", "split": "train"}
    pack(tmp_path / "files", tmp_path / "packed", progress=False)
    task = TASKS.parse(data).build()
    task.check(vocabulary, tokenizers)
    figures = task.evaluate(Generator(model.eval(), vocabulary, tokenizers))
    assert figures["text_bytes"] == 3 and not any(k.startswith("image") for k in figures)
    asked = TASKS.parse(data | {"modalities": ["image"]}).build()
    for call in (
        lambda: asked.check(vocabulary, tokenizers),
        lambda: asked.evaluate(Generator(model, vocabulary, tokenizers)),
    ):
        with pytest.raises(UserError, match="'image' has values in place of ids"):
            call()


def test_a_modality_that_is_not_there_is_named_where_it_was_asked_for(
    generator: Generator, tmp_path: Path
) -> None:
    data = packed(tmp_path, ["abc"])
    asked = {"kind": "bits_per_byte", "data": data, "split": "test", "modalities": ["image"]}
    with pytest.raises(UserError, match="no sample of split 'test' has 'image'"):
        TASKS.parse(asked).build().evaluate(generator)
