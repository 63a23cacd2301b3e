"""What was never mixed: experts, Mamba-2 and cross-attention in an encoder-decoder, in the loop.

And the same with LoRA over patches of pictures, which an encoder of its own reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainer_toys as toys
from PIL import Image
from trainer_runs import losses, make_run, resume_bitwise
from trainer_toys import toys_registered  # noqa: F401

from mm.data.batching.collate import to_batch
from mm.data.pack.job import pack
from mm.data.shards.reader import ShardSet
from mm.decoders.generate import generate_tokens
from mm.model.model import Model
from mm.registry import NETWORKS
from mm.run import Run
from mm.specs import Segment
from mm.tokenizers.image.patches import ImagePatchesConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.loop import train

MODEL = {
    "kind": "lm",
    "d_model": 16,
    "backbone": {
        "kind": "encoder_decoder",
        "encoder": {
            "pattern": "attention bidirectional",
            "mixers": {
                "attention": {"heads": 2},
                "bidirectional": {"inner": {"kind": "s4d", "states": 3}},
            },
            "ffn": {"kind": "moe", "experts": 4, "hidden": 8, "shared": 1},
        },
        "decoder": {
            "pattern": "mamba2 cross_attention",
            "mixers": {"mamba2": {"heads": 2}, "cross_attention": {"heads": 2, "kv_heads": 1}},
            "ffn": {"kind": "moe", "experts": 4, "hidden": 8},
            "ffns": {"mamba2": None},
            "blocks": {"cross_attention": {"kind": "gated"}},
        },
        "recompute": "selective",
    },
}


def mixed_run(out: Path, name: str, **data: object) -> Run:
    run = make_run(out, name, data=data)
    return run.model_copy(update={"model": NETWORKS.parse(MODEL)})


def test_it_trains_resumes_bit_by_bit_and_generates(tmp_path: Path) -> None:
    whole, halves = mixed_run(tmp_path, "whole"), mixed_run(tmp_path, "halves", signal_at=2)
    train(whole)
    with pytest.raises(SystemExit):
        train(halves)
    assert train(halves)["resumed_from"] == 3
    assert losses(whole) == losses(halves)
    a, b = (toys.load_toy(run.folder) for run in (whole, halves))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    gates = [name for name in a if "gates" in name]
    assert len(gates) == 2 and all(a[name].abs().item() > 0 for name in gates), "they have opened"

    model, vocabulary = Model.from_pretrained(whole.folder), toys.vocabulary()
    picture = Segment("image", np.arange(5), role="condition")
    (made,) = generate_tokens(model, vocabulary, [[picture]], "text", temperature=0, max_tokens=6)
    batch = to_batch([[[picture, Segment("text", made)]]], vocabulary)
    with torch.no_grad():
        logits = model(batch, loss=False).heads["tokens"].dist.logits
    first = vocabulary.range("text").first
    assert (
        len(made) and logits[: len(made), first : first + 20].argmax(-1).tolist() == made.tolist()
    )


LORA = {"kind": "lora", "rank": 2, "dropout": 0.1}
PATCHES: dict[str, Any] = MODEL | {
    "linear": LORA,
    "adapters": {
        "image": {
            "kind": "encoder",
            "inner": {"kind": "patches", "patch": 4, "width": 4},
            "width": 8,
            "linear": LORA,
            "backbone": {
                "kind": "stack",
                "depth": 1,
                "pattern": "attention",
                "mixers": {"attention": {"heads": 2}},
                "ffn": {"kind": "moe", "experts": 3, "top_k": 2, "hidden": 8},
            },
        }
    },
}
LEARNT = ("*.lora_a", "*.lora_b", "*gates*", "adapters.image.inner.*", "heads.*")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of pictures of two shapes, as patches, with captions."""
    source = tmp_path_factory.mktemp("pictures") / "source"
    source.mkdir()
    for i in range(12):
        shape = ((8, 8, 3), (8, 12, 3))[i % 2]
        pixels = np.random.default_rng(i).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(source / f"{i:02d}.png")
        (source / f"{i:02d}.txt").write_text(f"p{i}")
    made = {
        "image": ImagePatchesConfig(patch=4, max_patches=16).build(),
        "text": BytesConfig(modality="text").build(),
    }
    pack(source, source.parent / "tokens", tokenizers=made, progress=False)
    return source.parent / "tokens"


def patches_run(tokens: Path, out: Path, name: str) -> Run:
    asked = {"kind": "any_to_any", "condition_dropout": 0.0, "tasks": {"image>text": 1.0}}
    data = {"kind": "packed", "sources": [{"path": str(tokens)}], "seq_len": 48, "batch_size": 2}
    stage = {
        "data": data | {"max_documents": 6, "transform": [asked]},
        "objective": "next_token",
        "budget": {"steps": 6},
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "train": LEARNT,
        "eval_every": 0,
    }
    return Run.model_validate(
        {
            "name": name,
            "out": out,
            "vocabulary": tokens / "vocabulary.json",
            "model": PATCHES,
            "stages": [stage],
            "engine": {"zero_stage": 2, "precision": "fp32"},
            "checkpoints": {"every": 2},
        }
    )


@pytest.mark.slow
def test_with_lora_over_patches_it_trains_resumes_and_samples(
    pictures: Path, tmp_path: Path
) -> None:
    whole, halves = (patches_run(pictures, tmp_path, name) for name in ("whole", "halves"))
    (a,) = resume_bitwise(whole, halves)
    # Every adapter of the decoder, of the encoder and of the pictures' own encoder has learnt.
    ups = [name for name in a if name.endswith("lora_b")]
    parts = ("backbone.encoder", "backbone.decoder", "adapters.image")
    assert all(any(name.startswith(part) for name in ups) for part in parts), ups
    assert all(a[name].abs().sum() > 0 for name in ups)

    model = Model.from_pretrained(whole.folder)
    vocabulary = ShardSet.open(pictures).vocabulary
    assert vocabulary is not None
    values = np.random.default_rng(0).integers(0, 256, (2, 2, 48), np.uint8)
    picture = Segment("image", np.full(4, -1), values.reshape(4, 48), role="condition", grid=(2, 2))
    (made,) = generate_tokens(model, vocabulary, [[picture]], "text", temperature=0, max_tokens=6)
    batch = to_batch([[[picture, Segment("text", made)]]], vocabulary)
    with torch.no_grad():
        logits = model(batch, loss=False).heads["tokens"].dist.logits
    first = vocabulary.range("text").first
    likeliest = logits[: len(made), first : first + 256].argmax(-1).tolist()
    assert len(made) and likeliest == made.tolist()
