"""The held-out form of every stream: another split, always the same, shared by the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_toys import token_shards
from stream_cases import CASES

from mm.config import Config
from mm.data.shards.reader import ShardSet
from mm.data.streams.documents import TokenSource


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("split")
    token_shards(root, 37, val_share=0.3)
    return root


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


def batches(config: Config, n: int = 3, **kw: Any) -> list[Any]:
    stream = config.build(seed=0, **kw)
    return [micro for _ in range(n) for micro in stream.next()]


def tensor(b: Any) -> torch.Tensor:
    return b.ids if b.ids.numel() else next(iter(b.values.values())).data


def test_it_holds_the_split_and_nothing_else(split: Path, case: Any) -> None:
    config = case(split).held_out()
    shards = ShardSet.open(split / "shards", "val")
    keys = {shards.key(i) for i in range(len(shards))}
    seen = {key for b in batches(config, 20) for key in b.keys}
    assert seen and seen <= keys
    assert type(config) is type(case(split)) and config.prefetch == 0


def test_it_is_the_same_every_time_and_the_ranks_share_it(split: Path, case: Any) -> None:
    config = case(split).held_out()
    whole, again = batches(config), batches(config)
    assert all(torch.equal(tensor(a), tensor(b)) for a, b in zip(whole, again, strict=True))
    parts = [batches(config, rank=rank, world=2) for rank in range(2)]
    for b, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(tensor(b), torch.cat([tensor(first), tensor(second)]))


def test_there_is_none_without_the_split_or_of_the_split_that_trains(
    split: Path, data: Path, case: Any
) -> None:
    assert case(data).held_out() is None
    assert case(split).held_out("test") is None
    assert case(split).held_out().held_out() is None


def test_a_source_whose_weight_moves_has_its_largest(split: Path) -> None:
    """A source that fades out is held out all the same."""
    source = TokenSource(path=split / "tokens", weight={0: 3.0, 9: 0.0})
    held_out = source.held_out("val")
    assert held_out is not None and held_out.weight == 3.0 and held_out.split == "val"


def test_images_are_not_augmented(split: Path) -> None:
    config = CASES["items"](split)
    assert config.augment.active and not config.held_out().augment.active  # type: ignore[attr-defined]
