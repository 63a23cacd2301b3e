"""Streams counted and ordered by hand: blocks, what a step counts, what the index tells."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stream_cases import CASES, N

from mm.data.pack.config import PackConfig
from mm.data.pack.encode import Item
from mm.data.pack.output import PackOutput
from mm.data.pack.pool import Pool, Worker
from mm.data.pack.pretokenized import TokenIds
from mm.data.pack.report import PackReport
from mm.data.pack.worker import PreparedRecord
from mm.data.shards.index import spread
from mm.data.sources.base import Record
from mm.data.streams import survey
from mm.data.streams.blocks import Document, block_of, first_fit, lay_rows
from mm.data.streams.packed import PackedConfig, PackedStream
from mm.data.streams.raw_items import ItemsStream
from mm.data.streams.shuffle import splitmix64
from mm.data.streams.stateful import StatefulConfig
from mm.specs import Segment, TokenSpec

GOLDEN = 0x9E3779B97F4A7C15


def test_splitmix64_gives_the_published_numbers() -> None:
    """The first outputs of Vigna's splitmix64.c from state 0, and from 1234567."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    other = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for seed, want in ((0, first), (1234567, other)):
        states = [(seed + (i + 1) * GOLDEN) % 2**64 for i in range(3)]
        assert splitmix64(np.array(states, np.uint64)).tolist() == want


def test_streams_take_the_blocks_of_a_round_from_a_drawn_place_on() -> None:
    """A run's order of data is this rule: another one changes what every run reads."""
    rows = 5
    for turn in range(8):
        told = hashlib.blake2b(repr((3, "turn", turn)).encode(), digest_size=8).digest()
        drawn = int.from_bytes(told, "little")
        want = [turn * rows + (r + drawn) % rows for r in range(rows)]
        assert [block_of(3, r, turn, rows) for r in range(rows)] == want


def test_the_first_row_with_room_takes_a_document() -> None:
    lengths = np.array([5, 6, 3, 2, 1])
    assert first_fit(lengths, 8, 9) == [[0, 2], [1, 3], [4]]
    assert first_fit(lengths, 8, 2) == [[0, 2], [1, 3], [4]]
    assert first_fit(np.array([1, 1, 1, 1, 1]), 8, 2) == [[0, 1], [2, 3], [4]]
    assert first_fit(lengths, 8, 9, names=np.array([7, 5, 3, 1, 0])) == [[7, 3], [5, 1], [0]]


def test_second_sequences_must_fit_their_own_row_too() -> None:
    """The first row has room for all three documents, but not for two sources of 5 in 8."""
    others = np.array([[5], [5], [3]])
    assert first_fit(np.array([2, 2, 2]), 8, 9, others=others, part_len=8) == [[0, 2], [1]]
    documents = [Document(0, 0, i, 0, 2, (5,)) for i in range(4)]
    rows = lay_rows(documents, 8, 9, key=3, part_len=8)
    assert [len(row) for row in rows] == [1] * 4


def test_what_is_too_long_for_a_row_is_counted(data: Path) -> None:
    config = PackedConfig(
        sources=[{"path": data / "tokens"}], seq_len=40, batch_size=2, block_samples=20
    )
    stream = config.build(seed=0)
    cursor, counted = stream.start(), 0
    while min(cursor["block/0"], cursor["block/1"]) < 2:
        step = stream.advance(cursor)
        counted += step.counts["rejects/too_long"]
        cursor = step.cursor
    # A block counts when its first row is given: those that were begun.
    begun = [cursor[f"block/{r}"] + (cursor[f"row/{r}"] > 0) for r in range(2)]
    blocks = [block_of(0, r, turn, 2) for r in range(2) for turn in range(begun[r])]
    assert counted == sum(stream.plan_block(b).too_long for b in blocks) > 0
    assert cursor["rejects/too_long"] == counted


def test_mean_tokens_are_those_of_the_first_pass(data: Path) -> None:
    """A drawn task makes documents of other lengths in every pass; the mixture asks for these."""
    stream = CASES["packed-transform"](data).build(seed=0)
    total: dict[str, float] = {}
    documents, block = set(), 0
    counts: dict[str, int] = dict.fromkeys(stream.counted, 0)
    while stream.mix.drawn_before(block)[0] < N:
        for row in stream.plan_block(block).rows:
            for d in row:
                if d.epoch == 0:
                    documents.add(d.sample)
                    for s in (s for s in stream._read(d, counts) if s.ids is not None):
                        total[s.modality] = total.get(s.modality, 0.0) + len(s.ids) + 2
        block += 1
    found = stream._mean_tokens(0)
    assert len(documents) > N // 2
    assert found == pytest.approx({m: n / N for m, n in total.items()})


def test_mean_tokens_are_asked_of_pass_0_and_of_what_fits() -> None:
    """Each pass makes documents 90 codes longer; sample 2 is filtered, and counts as one.

    What stands in a second sequence, or labels the document, is none of its row.
    """

    class Three:
        def __len__(self) -> int:
            return 3

    beside = [
        Segment("text", np.zeros(7), part="source"),
        Segment("text", np.zeros(9), role="label"),
    ]
    made = lambda s, epoch, i: ([Segment("text", np.zeros(5 + 90 * epoch)), *beside], i)
    stream = SimpleNamespace(
        sources=[Three()],
        transforms=[SimpleNamespace(parts=(1,))],
        plan_sample=lambda s, epoch, i: made(s, epoch, i) if i < 2 else ([], None),
        fate=lambda raw, made: "" if made else "filtered",
    )
    found = PackedStream._mean_tokens(stream, 0)  # type: ignore[arg-type]
    assert found == {"text": pytest.approx(2 * (5 + 2) / 3)}


def test_documents_that_a_row_begins_are_counted_once(data: Path) -> None:
    """Of rows that continue: those it is done with and the one it is in, less those left out.

    What is left out leaves no place of a row empty: the next document begins there.
    """
    config = StatefulConfig(
        source={"path": data / "tokens"}, seq_len=11, batch_size=3, max_documents=3, max_length=30
    )
    stream = config.build(seed=0)
    cursor, sums = stream.start(), dict.fromkeys(("documents", "too_long", "filtered"), 0)
    for _ in range(30):
        step = stream.advance(cursor)
        cursor = step.cursor
        sums = {k: n + step.counts[k] for k, n in sums.items()}
        assert step.counts["used"] == step.counts["places"] == 3 * 11
    met = sum(cursor[f"number/{r}"] + (cursor[f"index/{r}"] > 0) for r in range(3))
    assert sums["too_long"] > 0 and sums["documents"] == met - sums["too_long"] - sums["filtered"]


def test_a_pass_over_buckets_counts_every_sample_or_why_not(data: Path) -> None:
    config = CASES["bucketed"](data).model_copy(
        update={"transform": [{"kind": "any_to_any", "tasks": {"audio>text": 1}}]}
    )
    stream = config.build(seed=0)
    cursor = stream.start()
    while cursor["epoch"] == 0:
        cursor = stream.advance(cursor).cursor
    assert cursor["samples/0"] + cursor["rejects/filtered"] == N
    assert min(cursor["samples/0"], cursor["rejects/filtered"]) > 0


class Lengths:
    """The index of four samples, of one modality: absent, empty, three, absent."""

    totals = {"text": (2, 3)}

    def __len__(self) -> int:
        return 4

    def lengths(self, modality: str) -> np.ndarray:
        return np.array([-1, 0, 3, -1])


def test_an_empty_item_is_there_and_one_of_length_minus_one_is_not() -> None:
    having = ItemsStream._having(SimpleNamespace(shards=Lengths()), "text")  # type: ignore[arg-type]
    assert [having[i] for i in range(len(having))] == [1, 2]


def test_a_survey_of_some_samples_tells_of_all(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of 37 are looked at: each stands for 37 over their number."""
    stream = CASES["packed-transform"](data).build(seed=0)
    some = spread(N, 24, 4)
    monkeypatch.setattr(survey, "spread", lambda n, most: some)
    (found,) = stream.survey(10)
    shards = stream.sources[0]
    assert len(some) <= 24
    for modality, entry in found["modalities"].items():
        there = int((shards.lengths(modality)[some] >= 0).sum())
        assert entry["samples"] == round(there * N / len(some)), modality


@pytest.mark.parametrize(
    ("ids", "bad"), [([0, 9], None), ([3, 10], 10), ([10, 3], 10), ([2, -1], -1)]
)
def test_ids_outside_the_tokenizer_are_refused_wherever_they_stand(
    ids: list[int], bad: int | None
) -> None:
    item = Item({"text": np.array(ids, "<i4").tobytes()}, 7)
    (result,) = TokenIds([TokenSpec("text", 10)]).encode([item])
    assert result.bad == ("" if bad is None else f"text: id {bad} outside 0..9")
    assert result.rest == 7


def test_the_journal_counts_all_records_that_were_looked_at(tmp_path: Path) -> None:
    """A pack that was cut off goes on after them, so those left out count, too."""

    def output() -> PackOutput:
        config = PackConfig(src=tmp_path / "src", out=tmp_path / "out", max_bad=1.0)
        return PackOutput(tmp_path, config, False, "identity")

    def record(n: int, bad: str) -> PreparedRecord:
        own = Record(f"sample{n}", f"line {n}", {})
        return PreparedRecord(own, {"text": b"abc"}, {"text": "txt"}, {"text": 3}, bad)

    first = output()
    first.add([record(n, "no text" if n % 2 else "") for n in range(3)], None)
    first.add([record(3, "")], None)
    first.save(None, seconds=0.0)
    again = output()
    assert (again.records, again.good, again.bad) == (4, 3, 1)


@pytest.mark.parametrize("itself", [True, False])
def test_a_source_that_splits_itself_keeps_its_training_samples(
    tmp_path: Path, itself: bool
) -> None:
    """The share of train that becomes val was taken already, from the end of the text."""
    config = PackConfig(src=tmp_path / "src", out=tmp_path / "out", val_share=1.0)
    output = PackOutput(tmp_path, config, itself, "identity")
    own = Record("sample", "line 1", {}, split="train")
    output.add([PreparedRecord(own, {"text": b"abc"}, {"text": "txt"}, {"text": 3}, "")], None)
    assert list(output.writers) == (["train"] if itself else ["val"])
    output.abort(tmp_path / "out")


def test_a_report_adds_up_the_splits_of_a_manifest() -> None:
    """Of one that says nothing about duplicates, as older ones do."""
    split = {"samples": 2, "bytes": 10, "lengths": {"text": {"count": 2, "total": 7}}}
    splits = {"train": split, "val": split}
    manifest = {"kind": "raw", "splits": splits, "quarantined": 1, "ignored": {}}
    found = PackReport.of(Path("out"), manifest, 1.5)
    assert (found.out, found.kind, found.already) == (Path("out"), "raw", False)
    assert (found.samples, found.bytes) == ({"train": 2, "val": 2}, 20)
    assert (found.modalities, found.lengths) == ({"text": 4}, {"text": 14})
    assert (found.quarantined, found.duplicates, found.seconds) == (1, 0, 1.5)


def test_a_pool_that_is_left_ends_its_busy_workers() -> None:
    """Not when they are done: a video that takes an hour is among what they read."""
    worker: Any = Worker.__new__(Worker)
    worker.process = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(10)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    pool = Pool(b"", 1)
    pool.all.append(worker)
    pool.__exit__()
    assert worker.process.returncode == -9
