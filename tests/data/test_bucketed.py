"""2-D length buckets and token-budget batches."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_toys import token_shards

from mm.data.shards.index import spread
from mm.data.streams import bucketed, classes
from mm.data.streams.bucketed import BucketedConfig
from mm.data.streams.buckets import make_buckets
from mm.errors import UserError


def padding(lengths: np.ndarray, groups: list[np.ndarray]) -> float:
    """Share of places that are padding when each axis of a group is as long as its longest."""
    places = sum(len(g) * lengths[g].max(0).sum() for g in groups)
    return 1 - lengths[np.concatenate(groups)].sum() / places


def grid(lengths: np.ndarray, first: int, second: int) -> list[np.ndarray]:
    """Buckets by quantiles (of the mass) of the one length, then of the other within each."""

    def cut(part: np.ndarray, axis: int, n: int) -> list[np.ndarray]:
        order = part[np.argsort(lengths[part, axis], kind="stable")]
        mass = np.cumsum(lengths[order, axis])
        edges = np.searchsorted(mass, mass[-1] * np.arange(1, n) / n)
        return [p for p in np.split(order, edges) if len(p)]

    strips = cut(np.arange(len(lengths)), 0, first)
    return [np.sort(cell) for strip in strips for cell in cut(strip, 1, second)]


def test_padding_of_long_tailed_lengths() -> None:
    """Random batches > 40 %.

    104 buckets of two lengths < 10 %, which 128 of a grid of quantiles have not; and less than as
    many of one length.
    """
    rng = np.random.default_rng(0)
    audio = rng.lognormal(5.0, 0.7, 20000)
    text = audio * rng.lognormal(-1.0, 0.5, 20000)
    lengths = np.stack([audio, text], 1).astype(np.int64) + 1
    random = np.array_split(rng.permutation(20000), 20000 // 16)
    groups = lambda b: [np.flatnonzero(of(b) == k) for k in range(len(b.bound))]
    of = lambda b: b.of(lengths[:, : b.bound.shape[1]])
    batches = lambda gs: [p for g in gs for p in np.array_split(g, max(1, len(g) // 16))]
    two = groups(make_buckets(lengths, 104))
    one = groups(make_buckets(lengths[:, :1], 104))
    assert len(two) == 104 and len(one) == 104
    assert padding(lengths, random) > 0.4
    assert padding(lengths, batches(two)) < 0.10 < padding(lengths, batches(grid(lengths, 16, 8)))
    assert padding(lengths, batches(two)) < padding(lengths, batches(one))
    for n in (32, 64, 128):
        best = padding(lengths, groups(make_buckets(lengths, n)))
        assert best < 0.75 * padding(lengths, grid(lengths, n // 8, 8))


def test_each_cut_is_the_best_one() -> None:
    """Against all cuts of one bucket, on both axes, written out."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        lengths = rng.integers(1, 12, (9, 2))
        cells = lambda g, lengths=lengths: len(g) * int(lengths[g].max(0).sum())
        options = {cells(np.arange(9))}
        for axis in (0, 1):
            for border in range(1, 12):
                short = lengths[:, axis] <= border
                if 0 < short.sum() < 9:
                    options.add(cells(np.flatnonzero(short)) + cells(np.flatnonzero(~short)))
        made = make_buckets(lengths, 2)
        got = sum(cells(np.flatnonzero(made.of(lengths) == k)) for k in range(len(made.bound)))
        assert got == min(options)


def test_equal_lengths_are_one_cell_and_a_million_are_fitted_at_once() -> None:
    """Repeating every sample changes no cut; a million are fitted within a second (about 0.4 s)."""
    rng = np.random.default_rng(5)
    few = rng.integers(1, 40, (300, 2))
    once, often = make_buckets(few, 16), make_buckets(np.tile(few, (7, 1)), 16)
    np.testing.assert_array_equal(often.bound, once.bound)
    np.testing.assert_array_equal(often.of(np.tile(few, (7, 1))), np.tile(once.of(few), 7))
    audio = rng.lognormal(5.0, 0.7, 1_000_000)
    text = audio * rng.lognormal(-1.0, 0.5, len(audio))
    lengths = np.stack([audio, text], 1).astype(np.int64) + 1
    begun = time.thread_time()
    made = make_buckets(lengths, 64, 8)
    assert time.thread_time() - begun < 1.0
    of = made.of(lengths)
    assert (lengths <= made.bound[of]).all() and np.bincount(of).min() >= 8


def test_buckets_partition_and_bound() -> None:
    rng = np.random.default_rng(1)
    for n, count, least in ((1, 4, 1), (7, 6, 1), (500, 20, 1), (500, 20, 16), (500, 1, 1)):
        lengths = rng.integers(0, 9, (n, 2))
        found = make_buckets(lengths, count, least)
        assert 1 <= len(found.bound) <= count
        of = found.of(lengths)
        assert (lengths <= found.bound[of]).all()
        counts = np.bincount(of, minlength=len(found.bound))
        assert (counts >= min(least, n)).all()
        assert (np.diff(found.bound.sum(1)) >= 0).all(), "from short to long"


def test_by_the_whole_length(tmp_path: Path) -> None:
    """`axes: [total]` has the least padding, as rows hold all modalities."""
    token_shards(tmp_path, 61)
    source = {"path": tmp_path / "tokens"}
    shares = {}
    for axes in (("audio", "text"), ("total",)):
        config = BucketedConfig(source=source, axes=axes, buckets=4, batch_size=2, prefetch=0)
        stream = config.build(seed=2)
        places = used = 0
        while stream.state_dict()["cursor"]["epoch"] == 0:
            (b,) = stream.next()
            places += b.ids.shape[0] * b.ids.shape[1]
            used += int((b.layout.fields.document > 0).sum())
        shares[axes] = 1 - used / places
    assert shares["total",] < shares["audio", "text"]
    with pytest.raises(UserError, match="data.axes: 'speech' is unknown"):
        BucketedConfig(source=source, axes=("speech",)).build()


def test_every_sample_once_an_epoch_within_the_budget(tmp_path: Path) -> None:
    token_shards(tmp_path, 61)
    config = BucketedConfig(
        source={"path": tmp_path / "tokens"}, buckets=4, batch_size=4, tokens=500, prefetch=0
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


def test_a_sample_is_found_by_its_class_without_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several chunks, more than are kept; as `flatnonzero` of all classes would."""
    monkeypatch.setattr(classes, "CHUNK", 16)
    monkeypatch.setattr(classes, "KEPT", 3)
    rng = np.random.default_rng(0)
    for n in (1, 16, 17, 500):
        kinds = rng.choice(4, n, p=[0.5, 0.45, 0.05, 0.0])
        found = classes.Classes(n, 4, lambda first, stop, kinds=kinds: kinds[first:stop])
        for k in range(4):
            expected = np.flatnonzero(kinds == k)
            assert found.count(k) == len(expected) == len(classes.OfClass(found, k))
            if len(expected):
                order = rng.permutation(len(expected))
                assert (found.select(k, order) == expected[order]).all()
                assert classes.OfClass(found, k)[len(expected) - 1] == expected[-1]
    assert len(found._kept) <= 3
    some = spread(1000, 64, 16)
    assert len(some) == 64 and some[0] == 0 and some[-1] == 999 and (np.diff(some) > 0).all()


def test_the_cuts_of_some_samples_bound_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket is as long as the longest of all its samples, fitted or not; each comes once."""
    token_shards(tmp_path, 61)
    monkeypatch.setattr(classes, "CHUNK", 4)
    monkeypatch.setattr(bucketed, "spread", lambda n, most: spread(n, 12, 4))
    config = BucketedConfig(
        source={"path": tmp_path / "tokens"}, buckets=3, batch_size=2, prefetch=0
    )
    stream = config.build(seed=1)
    seen: Counter[str] = Counter()
    while stream.state_dict()["cursor"]["epoch"] == 0:
        (b,) = stream.next()
        weighed = (b.weight.sum(1) > 0).tolist()
        seen.update(k for k, w in zip(b.keys, weighed, strict=True) if w)
    assert len(seen) == 61 and set(seen.values()) == {1}
