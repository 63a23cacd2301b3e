"""What the start of a stage tells of its data is what its steps then see."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stream_cases import CASES, TASKS

from mm.data.shards.index import spread
from mm.data.streams import survey
from mm.data.streams.blocks import sketch_of
from mm.data.streams.packed import PackedConfig, PackedStream
from mm.data.streams.stateful import StatefulConfig
from mm.registry import TRANSFORMS
from mm.specs import Segment

LENGTHS = {"text": (5, 13, 40), "image": (16,), "audio": (9, 30)}


def documents(n: int = 24) -> list[list[Segment]]:
    """Segments with ids that differ, of every set of modalities."""
    rng, out = np.random.default_rng(0), []
    for i in range(n):
        chosen = [m for k, m in enumerate(LENGTHS) if (i + 1) >> k & 1] or ["text"]
        sizes = [int(rng.choice(LENGTHS[m])) for m in chosen]
        out.append(
            [
                Segment(m, rng.integers(0, 9, size).astype(np.int32))
                for m, size in zip(chosen, sizes, strict=True)
            ]
        )
    return out


@pytest.mark.parametrize("kind", list(TRANSFORMS))
def test_law_a_transform_by_length_does_not_read_ids(kind: str) -> None:
    """Law of `Transform.by_length`: ids of 0 fare as others do, so the index alone tells."""
    transform = TRANSFORMS.get(kind).smallest().build()
    if not transform.by_length:
        return
    for n, real in enumerate(documents()):
        blank = [s._replace(ids=np.zeros_like(s.ids)) for s in real]
        made = [transform(list(d), np.random.default_rng(n)) for d in (real, blank)]
        told = [
            d
            if d is None
            else [(s.modality, s.role, None if s.ids is None else len(s.ids)) for s in d]
            for d in made
        ]
        assert told[0] == told[1]
        sketch = sketch_of(blank, made[1] or [])
        if sketch is not None:  # what was planned by lengths, with the ids, is what the ids give
            ids = {s.modality: s.ids for s in real}
            filled = [s._replace(ids=ids[m]) if m else s for m, s in sketch]
            np.testing.assert_equal(*([s._asdict() for s in d or []] for d in (filled, made[0])))


@pytest.mark.parametrize("name", list(CASES))
def test_epochs_are_those_that_the_steps_make(data: Path, name: str) -> None:
    """About: a mixture that changes packs unlike its first block, and blocks are small here."""
    stream = CASES[name](data).build(seed=0)
    found = stream.survey(40)
    for _ in range(40):
        stream.next()
    stream.close()
    expected = pytest.approx(passes(stream), rel=0.15, abs=0.25)
    assert min(f["epochs"] for f in found) == expected


def passes(stream: Any) -> float:
    """Of all rows together, where `epoch` is that of the row behind, in whole blocks."""
    if not isinstance(stream, PackedStream):
        return stream.epoch
    at, rows = stream.state_dict()["cursor"], stream.config.batch_size
    done = 0.0
    for r in range(rows):
        turn = at[f"block/{r}"]
        done += turn + at[f"row/{r}"] / len(stream._block(r, turn).rows)
    drawn = np.interp(done, *_drawn(stream, int(done)))
    return float(drawn)


def _drawn(stream: PackedStream, block: int) -> tuple[list[int], list[float]]:
    seen = [stream.mix.drawn_before(b) for b in (block, block + 1)]
    each = [min(n / len(s) for s, n in zip(stream.sources, b, strict=True)) for b in seen]
    return [block, block + 1], each


@pytest.mark.parametrize("name", ["packed", "packed-transform", "bucketed"])
def test_documents_that_stand_for_all_have_the_weight_of_what_is_not_left_out(
    data: Path, name: str
) -> None:
    built = CASES[name](data).build(seed=0)
    for s in range(len(built.sources)):
        figures, drawn = survey._Source(built, s).survey()
        gone = sum(share["samples"] for share in figures["left_out"].values())
        assert drawn.weight.sum() == pytest.approx(1 - gone)
        assert len(drawn.weight) == len(drawn.segments)


@pytest.mark.parametrize("tasks", [False, True])
def test_shares_left_out_are_those_of_an_epoch(data: Path, tasks: bool) -> None:
    """By samples and tokens; drawn tasks within their chance."""
    kind: dict[str, Any] = {"seq_len": 30, "batch_size": 2, "block_samples": 37, "prefetch": 0}
    kind |= {"sources": [{"path": data / "tokens"}], "max_documents": 4}
    stream = PackedConfig(**kind, transform=[TASKS] if tasks else ()).build(seed=0)
    (found,) = stream.survey(10)
    columns = [stream.sources[0].lengths(m) for m in LENGTHS]
    whole = np.sum([np.where(n >= 0, n + 2, 0) for n in columns], 0)
    too_long = whole > 30
    if not tasks:
        share = found["left_out"]["too_long"]
        assert share["samples"] == pytest.approx(too_long.mean())
        assert share["tokens"] == pytest.approx(whole[too_long].sum() / whole.sum())
        assert found["longest"] == whole.max() > 30
        for m, n in zip(LENGTHS, columns, strict=True):
            entry = found["modalities"][m]
            assert entry["samples"] == (n >= 0).sum()
            assert entry["tokens"] == (n[n >= 0] + 2).sum()
            assert entry["used"] == pytest.approx((~too_long[n >= 0]).mean())
        return
    blocks = [stream.plan_block(block) for block in range(20)]
    measured = sum(b.too_long for b in blocks) / (20 * 37)
    assert survey_share(found, "too_long") == pytest.approx(measured, abs=0.04)
    assert sum(found["tasks"].values()) == pytest.approx(1.0)


def test_some_samples_stand_for_very_many(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are scaled to all, shares are about those of all."""
    stream = CASES["packed-transform"](data).build(seed=0)
    (whole,) = stream.survey(10)
    monkeypatch.setattr(survey, "spread", lambda n, most: spread(n, 24, 4))
    (some,) = stream.survey(10)
    assert some["samples"] == whole["samples"]
    assert some["tokens"] == pytest.approx(whole["tokens"], rel=0.15)
    for m, entry in whole["modalities"].items():
        assert some["modalities"][m]["tokens"] == pytest.approx(entry["tokens"], rel=0.3)
    assert sum(some["tasks"].values()) == pytest.approx(1.0)


def survey_share(found: dict[str, Any], why: str) -> float:
    return found["left_out"].get(why, {"samples": 0.0})["samples"]


def test_a_stateful_stream_tells_what_is_over_its_length(data: Path) -> None:
    config = StatefulConfig(source={"path": data / "tokens"}, max_length=30, seq_len=8)
    (found,) = config.build().survey(10)
    assert found["left_out"]["too_long"]["samples"] > 0
    assert "data.max_length=" in config.build().mend("too_long", found["longest"])


def test_a_hundred_thousand_samples_take_less_than_a_second(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No document of theirs is read."""
    stream = CASES["packed-transform"](data).build(seed=0)
    rng, n = np.random.default_rng(0), 100_000
    lengths = {
        "text": rng.integers(5, 2000, n),
        "image": np.where(rng.random(n) < 0.5, 256, -1),
        "audio": np.where(rng.random(n) < 0.5, rng.integers(50, 900, n), -1),
    }
    shards = stream.sources[0]
    monkeypatch.setattr(type(shards), "__len__", lambda self: n)
    monkeypatch.setattr(shards, "lengths", lambda m: lengths[m])
    monkeypatch.setattr(shards, "segments", lambda m, at: (lengths[m][at] >= 0).astype(np.int64))
    monkeypatch.setattr(shards, "tokens", lambda i: pytest.fail("a document was read"))
    begun = time.process_time()
    (found,) = survey.survey_documents(stream, 1000)
    assert time.process_time() - begun < 1.0
    assert found["samples"] == n and found["left_out"]["too_long"]["samples"] > 0.5
