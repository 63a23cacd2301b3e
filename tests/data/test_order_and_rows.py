"""Two epochs and two windows have different orders; micro-batches of ranks are a partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stream_cases import CASES

from mm.config import Config
from mm.data.streams.base import rank_rows
from mm.data.streams.bucketed import BucketedConfig
from mm.data.streams.order import Windows
from mm.data.streams.packed import PackedConfig
from mm.data.streams.raw_items import ItemsConfig
from mm.data.streams.stateful import StatefulConfig
from mm.errors import UserError


@pytest.fixture(params=list(CASES))
def config(request: pytest.FixtureRequest, data: Path) -> Config:
    return CASES[request.param](data)


ONE_BY_ONE: dict[str, Callable[[Path], Config]] = {
    "packed": lambda d: PackedConfig(
        sources=[{"path": d / "tokens"}],
        seq_len=800,
        batch_size=1,
        max_documents=1,
        block_samples=1,
    ),
    "packed-window": lambda d: PackedConfig(
        sources=[{"path": d / "tokens"}],
        seq_len=800,
        batch_size=1,
        max_documents=1,
        block_samples=1,
        shuffle="window",
        window_samples=6,
    ),
    "bucketed": lambda d: BucketedConfig(source={"path": d / "tokens"}, buckets=1, batch_size=4),
    "stateful": lambda d: StatefulConfig(
        source={"path": d / "tokens"}, seq_len=800, batch_size=1, max_documents=1, max_length=800
    ),
    "items": lambda d: ItemsConfig(path=d / "shards", batch_size=1, size=6),
}


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_every_epoch_has_an_order_of_its_own(kind: str, data: Path) -> None:
    """What comes together, or one after the other, in one epoch does not in the next."""
    stream: Any = ONE_BY_ONE[kind](data).build(seed=3)
    steps: list[list[str]] = []
    while not steps or min(Counter(sum(steps, [])).values()) < 4:
        steps.append([key for b in stream.next() for key in b.keys])
        assert len(steps) < 500
    stream.close()
    if kind != "bucketed":
        n = len({key for step in steps for key in step})
        steps = [sum(steps[i : i + 2], []) for i in range(len(steps))]
        epochs = [{tuple(s) for s in steps[e * n : (e + 1) * n - 1]} for e in range(2)]
    else:
        n = len(steps) // 4
        epochs = [{tuple(sorted(s)) for s in steps[e * n : (e + 1) * n]} for e in range(2)]
    assert {k for s in epochs[0] for k in s} == {k for s in epochs[1] for k in s}
    assert len(epochs[0] & epochs[1]) < len(epochs[0]) / 4


def test_every_stream_has_a_case_of_one_by_one() -> None:
    assert {name.split("-")[0] for name in ONE_BY_ONE} >= {name.split("-")[0] for name in CASES}


@pytest.mark.parametrize("world, micro", [(1, 2), (2, 2), (2, 1), (4, 1), (2, None)])
def test_rows_of_all_ranks_are_a_partition(world: int, micro: int | None) -> None:
    parts = [rows for rank in range(world) for rows in rank_rows(8, micro, rank, world)]
    assert [row for rows in parts for row in rows] == list(range(8))
    assert all(len(rows) == (micro or 8 // world) for rows in parts)


def test_ranks_with_micro_batches_make_the_rows_of_one_process(config: Any) -> None:
    one = config.build(seed=3)
    small = config.model_copy(update={"micro_batch_size": 1})
    ranks = [small.build(seed=3, rank=r, world=2) for r in range(2)]
    for _ in range(4):
        (whole,) = one.next()
        parts = [b for stream in ranks for b in stream.next()]
        assert len(parts) == config.batch_size
        assert whole.keys == tuple(k for p in parts for k in p.keys)
    for stream in (one, *ranks):
        stream.close()


def test_every_window_is_mixed_in_its_own_way() -> None:
    order = Windows(np.array([64] * 3), 64, key=11)(np.arange(192))
    parts = [tuple(part % 64) for part in order.reshape(3, 64)]
    assert all(sorted(part) == list(range(64)) for part in parts)
    assert len(set(parts)) == 3


def test_sizes_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r"size 9 .* 5 processes; possible: \[1, 3, 9\]"):
        rank_rows(9, None, 0, 5)
    with pytest.raises(UserError, match=r"size 4 .* the 6 rows .* possible: \[1, 2, 3, 6\]"):
        rank_rows(12, 4, 0, 2)
    assert rank_rows(12, 99, 1, 2) == [range(6, 12)]
