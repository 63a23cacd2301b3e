"""Every task reads codebooks in one place as the model learnt them: asked at the model's door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import ToyTokenizer

from mm.batch import Batch
from mm.data.pack.job import pack
from mm.decoders.forecast import forecast
from mm.decoders.generate import Generator, save_media
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.registry import NETWORKS, TASKS
from mm.specs import Encoded, Waveform
from mm.tasks import harness
from mm.tokenizers.series.patches import SeriesPatchesConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.vocabulary import extend_vocabulary

BOOKS, CODES = 3, 5
AUDIO = {"sources": ("audio",)}
# What makes each task read recordings. A new task says here how it does, or why it cannot.
CASES: dict[str, dict[str, Any]] = {
    "bits_per_byte": {"modalities": ("audio",), "given": {"audio": "text"}, "max_tokens": 9},
    "recognition": AUDIO | {"max_tokens": 2},
    "judged_generation": {"to": "audio", "max_tokens": 6, "limit": 2},
    "text_error": AUDIO | {"max_tokens": 2},
    "token_loss": {},
    "transcription": {"source": "audio"},
    "retrieval": {"source": "audio"},
}
OTHERWISE = {
    "forecast": "it reads a series alone; conditions of one are tested below",
    "block_decoding": "it is refused, tested below",
}


class Codec(ToyTokenizer):
    """Three codebooks from the samples of a wave, and a wave from them."""

    def _one(self, raw: Any) -> Encoded:
        level = (np.abs(np.asarray(raw.samples)[::40]) * 100).astype(np.int32)
        books = [(level // (q + 1)) % CODES + CODES * q for q in range(BOOKS)]
        return Encoded(np.stack(books, 1).reshape(-1).astype(np.int32))

    def decode(self, codes: Any) -> list[Any]:
        levels = [np.asarray(code.ids)[::BOOKS] / CODES for code in codes]
        return [Waveform(np.repeat(x, 40).astype(np.float32), 8000) for x in levels]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards in `raw`, token shards in `tokens`: recordings of two classes with their words."""
    root = tmp_path_factory.mktemp("codes")
    rows = []
    for i in range(12):
        split, name = ("train", "test")[i % 3 == 2], ("up", "down")[i % 2]
        wave = np.random.default_rng(i).uniform(-0.5, 0.5, 400 + 40 * i).astype(np.float32)
        save_media(Waveform(wave, 8000), root / "source" / f"{i}.wav")
        rows.append(
            {"key": str(i), "audio": f"{i}.wav", "text": name, "label": name, "split": split}
        )
    (root / "source" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(root / "source" / "rows.jsonl", root / "raw", progress=False)
    tokenizers = {
        "audio": Codec("audio", CODES, BOOKS),
        "text": BytesConfig(modality="text").build(),
    }
    pack(root / "raw", root / "tokens", tokenizers=tokenizers, progress=False)
    return root


@pytest.fixture(scope="module", params=[(0, 1, 2), (0, 0, 0)], ids=["delay", "depth"])
def generator(request: Any) -> Generator:
    """A model of random weights with every head that a task asks for."""
    tokenizers = {
        "audio": Codec("audio", CODES, BOOKS),
        "text": BytesConfig(modality="text").build(),
        "time_series": SeriesPatchesConfig(patch=4, channels=1, norm_points=8).build(),
    }
    kind = "depth" if not any(request.param) else "parallel"
    model = {
        "kind": "lm",
        "d_model": 16,
        "adapters": {"time_series": {"kind": "linear", "d_in": 4}},
        "backbone": {"kind": "stack", "depth": 1},
        "heads": {
            "tokens": {"kind": "multi_token", "ahead": 1, "hidden": 8},
            "codes": {"kind": kind, "delays": {"audio": request.param}},
            "embedding": {"kind": "embedding", "d_out": 4},
            "text": "ctc",
            "time_series": {"kind": "mixture", "d_out": 4},
        },
    }
    vocabulary = extend_vocabulary([t.spec for t in tokenizers.values()])
    network = NETWORKS.parse(model).build(vocabulary)
    torch.manual_seed(0)
    init_weights(network)
    return Generator(network.eval(), vocabulary, tokenizers)


@pytest.fixture
def door(generator: Generator, monkeypatch: Any) -> Iterator[list[Batch]]:
    """The batches that the model was given."""
    seen: list[Batch] = []
    real = generator.model.forward

    def forward(batch: Batch, *given: Any, **named: Any) -> Any:
        seen.append(batch)
        return real(batch, *given, **named)

    monkeypatch.setattr(generator.model, "forward", forward)
    yield seen


def require_places(seen: list[Batch], generator: Generator) -> None:
    """Codes of all books came, each in its stream."""
    first = generator.vocabulary.range("audio").first
    found = set[int]()
    for batch in seen:
        for stream in range(batch.ids.shape[-1]):
            codes = batch.ids[..., stream] - first
            books = codes[(codes >= 0) & (codes < BOOKS * CODES)] // CODES
            assert (books == stream).all(), f"codes of book {books.max()} in stream {stream}"
            found |= set(books.tolist())
    assert found == set(range(BOOKS))


def test_every_task_has_its_case() -> None:
    assert set(TASKS) == CASES.keys() | OTHERWISE.keys()


@pytest.mark.parametrize("kind", sorted(CASES))
def test_a_task_reads_codebooks_in_their_places(
    kind: str, data: Path, generator: Generator, door: list[Batch]
) -> None:
    where = {"data": data / ("tokens" if kind == "token_loss" else "raw"), "split": "test"}
    figures = TASKS.parse({"kind": kind} | where | CASES[kind]).build().evaluate(generator)
    assert figures
    require_places(door, generator)


def test_a_series_goes_on_after_recordings_in_their_places(
    generator: Generator, door: list[Batch]
) -> None:
    given = {"audio": Waveform(np.full(400, 0.3, np.float32), 8000)}
    series = np.sin(np.arange(16, dtype=np.float32))[:, None]
    _, told = forecast(generator, {**given, "time_series": series}, "time_series", 8, draws=2)
    assert told.shape == (2, 8, 1)
    require_places(door, generator)


def test_what_takes_one_id_a_place_says_so(data: Path, generator: Generator) -> None:
    task = TASKS.parse({"kind": "block_decoding", "data": data / "raw", "modality": "audio"})
    with pytest.raises(UserError, match="several codes of 'audio' in one place"):
        task.build().evaluate(generator)
    with pytest.raises(UserError, match="the harness: the model has several codes of 'audio'"):
        harness.Scorer(generator, "audio", 64, 4)
