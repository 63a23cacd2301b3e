"""2-D length buckets and token-budget batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_toys import token_shards

from mm.data.bucketed import BucketedConfig, make_buckets
from mm.errors import UserError


def padding(lengths: np.ndarray, groups: list[np.ndarray]) -> float:
    """Share of places that are padding when each axis of a group is as long as its longest."""
    places = sum(len(g) * lengths[g].max(0).sum() for g in groups)
    return 1 - lengths[np.concatenate(groups)].sum() / places


def test_padding_of_long_tailed_lengths() -> None:
    """Random batches > 40 %; 2-D buckets < 10 %, and less than as many 1-D ones."""
    rng = np.random.default_rng(0)
    audio = rng.lognormal(5.0, 0.7, 20000)
    text = audio * rng.lognormal(-1.0, 0.5, 20000)
    lengths = np.stack([audio, text], 1).astype(np.int64) + 1
    random = np.array_split(rng.permutation(20000), 20000 // 16)
    groups = lambda b: [np.flatnonzero(b.of == k) for k in range(len(b.bound))]
    batches = lambda gs: [p for g in gs for p in np.array_split(g, max(1, len(g) // 16))]
    two = groups(make_buckets(lengths, (20, 12)))
    one = groups(make_buckets(lengths, (240, 1)))
    assert len(two) == 240 and len(one) <= 240
    assert padding(lengths, random) > 0.4
    assert padding(lengths, batches(two)) < 0.10
    assert padding(lengths, batches(two)) < padding(lengths, batches(one))


def test_buckets_partition_and_bound() -> None:
    rng = np.random.default_rng(1)
    for n, counts in ((1, (4, 4)), (7, (3, 2)), (500, (5, 4)), (500, (1, 1))):
        lengths = rng.integers(0, 9, (n, 2))
        found = make_buckets(lengths, counts)
        assert (found.of >= 0).all() and found.of.max() < counts[0] * counts[1]
        assert (lengths <= found.bound[found.of]).all()
        assert set(found.of.tolist()) == set(range(len(found.bound)))


def test_every_sample_once_an_epoch_within_the_budget(tmp_path: Path) -> None:
    token_shards(tmp_path, 61)
    config = BucketedConfig(
        source={"path": tmp_path / "tokens"}, buckets=(2, 2), batch_size=4, tokens=500, prefetch=0
    )
    stream = config.build(seed=2)
    orders = []
    for epoch in range(2):
        seen: Counter[str] = Counter()
        shapes = set()
        while stream.state_dict()["cursor"]["epoch"] == epoch:
            (b,) = stream.next()
            shapes.add(tuple(b.ids.shape[:2]))
            assert b.ids.shape[0] % 4 == 0 and b.ids.shape[0] * b.ids.shape[1] <= 500
            weighed = b.weight.sum(1) > 0
            seen.update(k for k, w in zip(b.keys, weighed.tolist(), strict=True) if w)
            assert stream.stats["rows"] == b.ids.shape[0]
        assert sorted(seen) == [f"s{i:03d}" for i in range(61)] and set(seen.values()) == {1}
        assert len({t for _, t in shapes}) > 1 and len({r for r, _ in shapes}) > 1
        orders.append(list(seen))
    assert orders[0] != orders[1]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    token_shards(tmp_path, 20)
    source = {"path": tmp_path / "tokens"}
    with pytest.raises(UserError, match="data.tokens 40: 4 rows of the longest bucket take"):
        BucketedConfig(source=source, batch_size=4, tokens=40).build()
    with pytest.raises(UserError, match="no document of at most data.max_length 4"):
        BucketedConfig(source=source, max_length=4).build()
    short = BucketedConfig(source=source, max_length=26, batch_size=2).build()
    short.next()
    assert short.stats["left_out"] > 0 and short.stats["length"] <= 26
    short.close()
