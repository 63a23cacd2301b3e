"""The `data order` law.

A resume goes on at any sample, world sizes partition the stream, packing drops and mixes nothing.

Runs over every kind of stream in the registry; `test_every_stream_has_a_case` asks for a new one's
line in `CASES`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_cases import CASES

from mm.batch import Batch
from mm.config import Config
from mm.data.streams.base import merge_states
from mm.data.streams.raw_items import ItemsConfig
from mm.data.streams.shuffle import key_of
from mm.errors import UserError
from mm.registry import SOURCES, STREAMS, TRANSFORMS


@pytest.fixture(params=list(CASES))
def config(request: pytest.FixtureRequest, data: Path) -> Config:
    return CASES[request.param](data)


def flat(b: Batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch by name."""
    out = {
        "ids": b.ids,
        "targets": b.targets,
        "weight": b.weight,
        "cu": b.layout.cu_seqlens,
        **b.layout.fields._asdict(),
        **b.labels,
    }
    out.pop("extra")
    out |= {f"place/{k}": v for k, v in b.places.items()}
    return out | {
        f"{k}/{f}": getattr(v, f) for k, v in b.values.items() for f in ("data", "length")
    }


def same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys == y.keys
        left, right = flat(x), flat(y)
        assert set(left) == set(right)
        for name in left:
            assert torch.equal(left[name], right[name]), name


def take(stream: Any, n: int) -> list[list[Batch]]:
    return [stream.next() for _ in range(n)]


def test_every_stream_has_a_case() -> None:
    assert set(STREAMS) <= {name.split("-")[0] for name in CASES}
    for registry in (STREAMS, TRANSFORMS, SOURCES):
        for kind in registry:
            smallest = registry.get(kind).smallest()
            assert registry.parse(smallest.to_dict()) == smallest


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_at_any_step_gives_the_same_stream(config: Any, prefetch: int) -> None:
    config = config.model_copy(update={"prefetch": prefetch})
    whole = config.build(seed=5)
    states, steps = [], []
    for _ in range(14):
        states.append(json.loads(json.dumps(whole.state_dict())))
        steps.append(whole.next())
    end = whole.state_dict()
    whole.close()
    after = whole.next()
    whole.close()
    for at in (0, 1, 6, 13):
        again = config.build(seed=5)
        again.next()  # a stream that has run may be moved
        again.load_state_dict(states[at])
        assert again.state_dict() == states[at]
        for expected in steps[at:]:
            same(again.next(), expected)
        assert again.state_dict() == end, "what was made ahead is not counted"
        again.close()
        same(again.next(), after)  # nor lost
        again.close()


def test_the_seed_is_what_the_order_depends_on(config: Any) -> None:
    first, same_seed, other = (config.build(seed=s).next() for s in (1, 1, 2))
    same(first, same_seed)
    assert first[0].keys != other[0].keys


def joined(ranks: list[Any]) -> dict[str, Any]:
    return merge_states([json.loads(json.dumps(s.state_dict())) for s in ranks])


def totals(ranks: list[Any]) -> dict[str, Any]:
    """What the trainer says of a step: the counts of all ranks, summed."""
    assert len({tuple(s.counts) for s in ranks}) == 1, "the same names in the same order"
    return ranks[0].summarize({k: sum(s.counts[k] for s in ranks) for k in ranks[0].counts})


@pytest.mark.parametrize("world", [2, 4])
def test_world_sizes_partition_the_global_batch(config: Any, world: int) -> None:
    one = config.build(seed=3)
    ranks = [config.build(seed=3, rank=r, world=world) for r in range(world)]
    for step in range(12):
        (whole,) = one.next()
        parts = [b for stream in ranks for b in stream.next()]
        assert whole.keys == tuple(k for p in parts for k in p.keys), (
            "no loss, no overlap, in order"
        )
        for name in ("ids", "targets", "weight"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
        for modality, value in whole.values.items():
            assert torch.equal(value.data, torch.cat([p.values[modality].data for p in parts])), (
                step
            )
        assert joined(ranks) == one.state_dict()
        assert totals(ranks) == one.stats
    for stream in (one, *ranks):
        stream.close()


def test_the_same_rows_whatever_the_worlds_between_stops(config: Any) -> None:
    """Law `same whatever W`: stopped and gone on with 4, 1, 2 and 4 processes."""
    one = config.model_copy(update={"prefetch": 0}).build(seed=3)
    state: dict[str, Any] | None = None
    for world in (4, 1, 2, 4):
        ranks = [config.build(seed=3, rank=r, world=world) for r in range(world)]
        for stream in ranks:
            if state is not None:
                stream.load_state_dict(state)
        for _ in range(5):
            (whole,) = one.next()
            parts = [b for stream in ranks for b in stream.next()]
            assert whole.keys == tuple(k for p in parts for k in p.keys)
            assert torch.equal(whole.weight, torch.cat([p.weight for p in parts]))
            assert totals(ranks) == one.stats
        state = joined(ranks)
        assert state == one.state_dict()
        for stream in ranks:
            own = json.loads(json.dumps(stream.state_dict()))
            stream.load_state_dict(own)  # as a run that goes back does
            assert stream.state_dict() == own
            stream.close()


def test_micro_batches_partition_the_rows_of_a_rank(config: Any) -> None:
    whole = config.build(seed=3)
    micro = config.model_copy(update={"micro_batch_size": 2}).build(seed=3)
    for _ in range(4):
        (a,), parts = whole.next(), micro.next()
        assert len(parts) == config.batch_size // 2
        assert a.keys == tuple(k for p in parts for k in p.keys)
        assert torch.equal(a.weight, torch.cat([p.weight for p in parts]))
    micro.load_state_dict(whole.state_dict())  # how rows are cut is no part of the order
    whole.close()
    micro.close()


def test_sizes_that_do_not_divide_are_errors(config: Any) -> None:
    with pytest.raises(
        UserError, match=r"data.batch_size \d does not divide over 3 processes; possible: \[1, 2, 4"
    ):
        config.build(world=3)
    with pytest.raises(UserError, match="data.micro_batch_size 3 does not divide"):
        config.model_copy(update={"micro_batch_size": 3}).build()


def test_another_plan_is_refused_by_name(config: Any) -> None:
    state = config.build(seed=1).state_dict()
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        config.build(seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="batch_size: . -> 16"):
        config.model_copy(update={"batch_size": 16}).build(seed=1).load_state_dict(state)


def test_items_come_once_an_epoch(data: Path) -> None:
    stream = ItemsConfig(path=data / "shards", batch_size=9, size=4).build(seed=0)
    assert len(stream) == 27
    for _ in range(3):
        keys = [k for (b,) in take(stream, 3) for k in b.keys]
        assert len(set(keys)) == len(keys) == 27
    stream.close()


def test_items_without_options_go_on_under_the_plan_of_before_there_were_any(data: Path) -> None:
    config = CASES["items"](data)
    aside = {"path", "micro_batch_size", "prefetch", "cache_mb", "options"}
    before = key_of(config.model_dump_json(exclude=aside)) % 2**32
    assert config.build(seed=0).plan["settings"] == before
    moved = config.model_copy(update={"cache_mb": 1, "prefetch": 0, "micro_batch_size": 1})
    assert moved.build(seed=0).plan["settings"] == before
    assert config.model_copy(update={"repeat": "unique"}).build(seed=0).plan["settings"] != before
