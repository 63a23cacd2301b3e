"""Law `cost falls`: a process plans and reads its own rows alone, however many there are in all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toys import token_shards
from stream_cases import CASES

from mm.data.shards.reader import ShardSet
from mm.data.streams.blocks import block_of
from mm.data.streams.mixing import plan
from mm.data.streams.order import SourceOrder
from mm.data.streams.packed import PackedConfig, PackedStream
from mm.data.streams.shuffle import permute
from mm.errors import UserError
from mm.specs import Segment

# ---- order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 7, 2**63 + 11])
def test_the_order_is_a_bijection_of_every_small_length(key: int) -> None:
    for n in range(1, 700):
        image = permute(np.arange(n), n, key)
        assert (np.bincount(image, minlength=n) == 1).all(), n


def test_the_order_of_a_huge_source_is_computed_where_asked() -> None:
    """Of 10^12 samples: no two of a million places are one sample, and they lie everywhere."""
    n, places = 10**12, np.arange(10**6) + 10**11
    image = permute(places, n, 5)
    assert len(np.unique(image)) == len(places) and 0 <= image.min() and image.max() < n
    assert np.bincount(image // (n // 10), minlength=10).min() > 98_000
    order = SourceOrder(3, 0, n, [n], 0)
    epochs, samples = order(np.array([n - 1, n, 2 * n + 5]))
    assert epochs.tolist() == [0, 1, 2] and len(set(samples.tolist())) == 3


def test_a_round_of_blocks_is_shared_by_the_row_streams() -> None:
    """Each block has one reader, and a stream has no fixed place in the round."""
    for rows in (1, 2, 12):
        read = [[block_of(3, r, turn, rows) for r in range(rows)] for turn in range(40)]
        assert sorted(sum(read, [])) == list(range(40 * rows))
        assert rows == 1 or len({number[0] % rows for number in read}) > 1


# ---- mixing ----------------------------------------------------------------------------------


def test_shares_are_exact_over_all_rows_at_every_round() -> None:
    """Within half a sample over the whole, within one in a block, by samples and by tokens."""
    tokens = [{"text": 10.0}, {"text": 90.0, "image": 10.0}, {"image": 400.0}]
    for mix in (
        plan([0.975, 0.02, 0.005], 224),
        plan([3, 1, 1], 17, "tokens", None, tokens),
        plan([1, 1, 1], 64, "samples", {"text": 0.3, "image": 0.7}, tokens),
    ):
        before = np.array([mix.drawn_before(b) for b in range(801)])
        exact = mix.shares[0] * mix.block_samples
        assert (np.abs(before - np.arange(801)[:, None] * exact) <= 0.5 + 1e-6).all()
        assert (np.abs(np.diff(before, axis=0) - exact) < 1 + 1e-6).all()


def test_no_row_stream_is_given_another_mixture(data: Path) -> None:
    """A source of every tenth block comes to all of ten row streams."""
    sources: Any = [{"path": data / "tokens"}, {"path": data / "tokens", "weight": 1 / 79}]
    config = PackedConfig(
        sources=sources,
        seq_len=64,
        batch_size=10,
        block_samples=8,
        prefetch=0,
    )
    stream: PackedStream = config.build(seed=1)
    by_row = Counter(
        r
        for r in range(10)
        for turn in range(60)
        if np.diff([stream.mix.drawn_before(b) for b in _around(stream, r, turn)], axis=0)[0][1]
    )
    assert len(by_row) == 10 and max(by_row.values()) < 20


def _around(stream: PackedStream, r: int, turn: int) -> list[int]:
    number = block_of(stream.seed, r, turn, 10)
    return [number, number + 1]


# ---- own rows --------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often samples were read and blocks planned."""
    seen: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        made = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            seen[name] += 1
            return made(self, *args)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (ShardSet, "tokens"),
        (ShardSet, "value"),
        (PackedStream, "plan_block"),
    ):
        counted(owner, name)
    return seen


@pytest.mark.parametrize("name", list(CASES))
def test_a_process_reads_its_own_rows_alone(name: str, data: Path, reads: Counter[str]) -> None:
    """Two rows of 2, 8 and 128: what rank 0 reads and plans for them does not grow."""
    found: dict[int, dict[str, float]] = {}
    for world in (1, 4, 64):
        config = CASES[name](data).model_copy(
            update={"batch_size": 2 * world, "tokens": None, "prefetch": 0, "cache_mb": 0}
        )
        stream: Any = config.build(seed=3, rank=0, world=world)
        stream.next()
        reads.clear()
        rows = 0
        for _ in range(30):
            rows += sum(len(b.ids) or len(b.keys) for b in stream.next())
        found[world] = {what: n / rows for what, n in reads.items()}
        state = json.dumps(stream.state_dict())
        assert len(state) < 2000, "a cursor of the own rows alone"
        if "number" not in state:
            assert len(stream.start()) <= 5
    for world in (4, 64):
        for what, n in found[1].items():
            assert found[world][what] <= 1.5 * n + 0.1, (what, world, found)


def test_planning_reads_no_sample(data: Path, reads: Counter[str]) -> None:
    stream: PackedStream = CASES["packed-transform"](data).build(seed=0)
    for number in range(8):
        assert stream.plan_block(number).rows
    assert reads["tokens"] == 0
    stream.next()
    stream.close()
    assert reads["tokens"] > 0


def test_what_was_planned_is_read_as_the_transforms_give_it(data: Path) -> None:
    """The transforms are not applied again, and no member is read that none of them took."""
    stream: PackedStream = CASES["packed-transform"](data).build(seed=0)
    documents = [d for row in stream.plan_block(0).rows for d in row]
    assert documents and all(d.sketch is not None for d in documents)
    for d in documents:
        place = (d.source, d.epoch, d.sample)
        plain, filled = stream.read_sample(*place, None), stream.read_sample(*place, d.sketch)
        np.testing.assert_equal([s._asdict() for s in filled], [s._asdict() for s in plain])
    read: list[Any] = []
    shards = stream.sources[0]
    shards.tokens = lambda i, of=None: read.append(of) or type(shards).tokens(shards, i, of)  # type: ignore[method-assign]
    stream.next()
    stream.close()
    assert None not in read and {1, 2} <= {len(of - {""}) for of in read}


# ---- what is refused -------------------------------------------------------------------------


def test_codes_are_not_decoded_as_files(data: Path) -> None:
    shards = ShardSet.open(data / "tokens", "train")
    for read in (lambda: shards[0], lambda: shards.value(0, "text")):
        with pytest.raises(
            UserError, match=r"tokens: token shards hold codes, see ShardSet\.tokens"
        ):
            read()


def test_a_checkpoint_of_the_older_order_is_refused_by_name(data: Path) -> None:
    stream = CASES["packed"](data).build(seed=0)
    state = stream.state_dict()
    old = {"cursor": {"step": 3, "block": 1, "row": 2}, "plan": dict(state["plan"])}
    old["plan"].pop("order")
    with pytest.raises(UserError, match="of another order of the data .*blocks over all rows"):
        stream.load_state_dict(old)
    assert stream.state_dict() == state


def test_a_transform_that_is_no_function_is_refused_by_sample(tmp_path: Path) -> None:
    token_shards(tmp_path, 20)
    sources: Any = [{"path": tmp_path / "tokens"}]
    stream = PackedConfig(sources=sources, seq_len=64, prefetch=0).build()
    made = stream.apply_transforms

    def first_alone(*a: Any) -> list[Segment]:
        """With ids of its own, so that it is applied again where the document is read."""
        return [s._replace(ids=s.ids.copy()) for s in (made(*a) or [])[:1]]

    stream.apply_transforms = first_alone  # type: ignore[method-assign]
    stream.next()
    stream.apply_transforms = made  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"tokens/train: sample 's\d+' has \d+ tokens and was plan"):
        stream.next()
