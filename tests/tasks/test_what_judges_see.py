"""Judges learn from the training split alone and see what the tokenizer gives back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tasks_learned import WORDS, Palette, make_image

from mm.data.pack.job import pack
from mm.decoders.media import save_media
from mm.registry import TASKS, TOKENIZERS
from mm.specs import Waveform
from mm.tasks.bits_per_byte import input_bytes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes; every label of the test split is another class's."""
    root, rng, rows = tmp_path_factory.mktemp("judges"), np.random.default_rng(0), []
    for split, n, shift in (("train", 60, 0), ("val", 9, 0), ("test", 30, 1)):
        for i in range(n):
            key = f"{split}-{i:03d}"
            save_media(make_image(i % 3, rng), root / "source" / f"{key}.png")
            word = WORDS[(i + shift) % 3]
            rows.append(
                {"key": key, "image": f"{key}.png", "split": split, "text": word, "label": word}
            )
    manifest = root / "source" / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    pack(manifest, root / "packed", progress=False)
    return root / "packed"


class Draws:
    """A generator without a model: it draws the class that it is asked for."""

    def __init__(self, gray: bool = False):
        self._image, self.gray = Palette(), gray
        self.tokenizers: dict[str, Any] = {}

    def tokenizer(self, modality: str) -> Any:
        return self._image

    def generate(self, prompts: Sequence[Any], to: str, **settings: Any) -> list[np.ndarray]:
        rng = np.random.default_rng(1)
        word = lambda prompt: prompt["text"] if isinstance(prompt, dict) else str(prompt)
        return [make_image(WORDS.index(word(p)), rng) for p in prompts]

    def encode(self, modality: str, raws: Sequence[Any]) -> list[Any]:
        return list(raws)

    def decode(self, modality: str, spans: Sequence[Any]) -> list[Any]:
        return [np.full_like(span, 127) if self.gray else span for span in spans]


def judged(data: Path, generator: Draws) -> dict[str, Any]:
    return TASKS.parse({"kind": "judged_generation", "data": data}).build().evaluate(generator)


def test_the_judge_never_saw_the_test_split(data: Path) -> None:
    """A judge that had learned these labels would be right about them."""
    assert judged(data, Draws())["text_to_image_judge_on_real_accuracy"] < 0.1


def test_the_judge_sees_reconstructions_not_originals(data: Path) -> None:
    """A tokenizer that gives gray for everything leaves nothing to tell classes by."""
    gray, exact = judged(data, Draws(gray=True)), judged(data, Draws())
    name = "text_to_image_judge_on_reconstruction_accuracy"
    assert gray[name] == pytest.approx(1 / 3)
    assert exact[name] == exact["text_to_image_judge_on_real_accuracy"]


def test_bytes_of_a_recording_count_at_the_rate_of_its_tokenizer() -> None:
    codec = TOKENIZERS.get("audio_codec").smallest_tokenizer()
    generator: Any = Draws()
    generator._image = codec
    for rate in (codec.sample_rate, 2 * codec.sample_rate):
        second = Waveform(np.zeros(rate, np.float32), rate)
        assert input_bytes(generator, "audio", [second, second], []) == 4 * codec.sample_rate
