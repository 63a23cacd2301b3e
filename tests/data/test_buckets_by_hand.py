"""Buckets against all cuts there are, and moved pictures against their pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mm.data.streams.buckets import make_buckets
from mm.data.transforms.augment_image import AugmentImageConfig
from mm.specs import Segment


def padding(lengths: np.ndarray, of: np.ndarray) -> int:
    """Tokens that a batch of each bucket pads, all axes together."""
    groups = [lengths[of == b] for b in np.unique(of)]
    return int(sum((g.max(0) - g).sum() for g in groups))


def best_cut(lengths: np.ndarray, least: int) -> int:
    """The least padding that one cut of one axis leaves, by trying them all."""
    found = [padding(lengths, np.zeros(len(lengths)))]
    for column in lengths.T:
        for value in np.unique(column)[:-1]:
            near = column <= value
            if min(near.sum(), (~near).sum()) >= least:
                found.append(padding(lengths, near))
    return min(found)


@pytest.mark.parametrize(("axes", "least"), itertools.product((1, 2, 3), (1, 4, 10)))
def test_the_first_cut_is_the_best_of_all(axes: int, least: int) -> None:
    rng = np.random.default_rng(axes * 100 + least)
    for _ in range(40):
        n = int(rng.integers(2, 21))
        lengths = rng.integers(0, 5, (n, axes)) ** rng.integers(1, 4)
        buckets = make_buckets(lengths, 2, least)
        of = buckets.of(lengths)
        assert padding(lengths, of) == best_cut(lengths, least)
        for b, bound in enumerate(buckets.bound):
            assert bound.tolist() == lengths[of == b].max(0).tolist()


def test_halves_of_exactly_the_least_number_may_be_cut() -> None:
    lengths = np.array([[1]] * 3 + [[9]] * 3)
    assert make_buckets(lengths, 2, least=3).of(lengths).tolist() == [0, 0, 0, 1, 1, 1]
    assert len(make_buckets(lengths, 2, least=4).bound) == 1


def test_cells_are_told_apart_on_every_axis() -> None:
    """16 pairs of lengths, enough buckets: nothing is padded, short buckets come first."""
    lengths = np.array([*itertools.product((0, 1, 10, 11), repeat=2)] * 2)
    buckets = make_buckets(lengths, 16)
    of = buckets.of(lengths)
    assert len(buckets.bound) == 16 and padding(lengths, of) == 0
    sums = buckets.bound.sum(1)
    assert (np.diff(sums) >= 0).all()
    # Of equal sums the bucket whose sample came first is first.
    first = [int(np.flatnonzero(of == b)[0]) for b in range(16)]
    assert all(first[b] < first[b + 1] for b in range(15) if sums[b] == sums[b + 1])


def test_cells_are_told_apart_where_one_axis_has_few_lengths() -> None:
    lengths = np.array([*itertools.product(range(4), range(2), range(3))])
    of = make_buckets(lengths, 24).of(lengths)
    assert len(set(of.tolist())) == 24


def as_patches(pixels: np.ndarray, p: int) -> Segment:
    rows, columns = pixels.shape[0] // p, pixels.shape[1] // p
    values = np.stack(
        [
            pixels[r * p : (r + 1) * p, c * p : (c + 1) * p].reshape(-1)
            for r in range(rows)
            for c in range(columns)
        ]
    )
    return Segment("image", values=values.astype(np.float32), grid=(rows, columns))


@pytest.mark.parametrize("mirror", [0.0, 1.0])
def test_a_moved_picture_is_its_pixels_elsewhere_with_edges_repeated(mirror: float) -> None:
    """Pictures of unequal sides; every move of up to two pixels is met, and none other."""
    p, rows, columns, shift = 2, 3, 2, 2
    pixels = np.arange(rows * p * columns * p * 3).reshape(rows * p, columns * p, 3)
    given = as_patches(pixels, p)
    seen = set()
    move = AugmentImageConfig(mirror=mirror, shift=shift).build()
    for seed in range(300):
        [moved] = move([given], np.random.default_rng(seed)) or []
        assert moved.values is not None and moved.values.shape == given.values.shape  # type: ignore[union-attr]
        for down, right in itertools.product(range(-shift, shift + 1), repeat=2):
            want = np.empty_like(pixels)
            for y, x in itertools.product(range(rows * p), range(columns * p)):
                fy = min(max(y + down, 0), rows * p - 1)
                fx = min(max(x + right, 0), columns * p - 1)
                want[y, x] = pixels[fy, columns * p - 1 - fx if mirror else fx]
            if np.array_equal(moved.values, as_patches(want, p).values):  # type: ignore[arg-type]
                seen.add((down, right))
                break
        else:
            raise AssertionError(f"seed {seed}: no move of at most {shift} pixels makes this")
    assert len(seen) == (2 * shift + 1) ** 2


def test_directions_are_those_of_the_draw() -> None:
    """The same seed has always moved a picture the same way: down first, then right."""
    pixels = np.arange(4 * 4 * 3).reshape(4, 4, 3)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        [moved] = (
            AugmentImageConfig(mirror=0.0, shift=1).build()(
                [as_patches(pixels, 2)], np.random.default_rng(seed)
            )
            or []
        )
        rng.random()
        down, right = rng.integers(-1, 2, 2)
        y, x = np.clip(np.arange(4) + down, 0, 3), np.clip(np.arange(4) + right, 0, 3)
        assert np.array_equal(moved.values, as_patches(pixels[y][:, x], 2).values)  # type: ignore[arg-type]
