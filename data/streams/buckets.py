"""Buckets of alike lengths: which cuts pad least, and which bucket a sample is in.

N samples, A axes, K buckets, C cells of equal lengths, V nodes of the tree of cuts.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np


class Buckets(NamedTuple):
    """``bound`` (K, A) int64: the longest lengths of every bucket; and the tree of its cuts.

    Node 0 is the root. A sample of at most ``value`` on ``axis`` goes to ``near``, another to
    ``far``; a leaf is its own child, and ``bucket`` is its number.
    """

    bound: np.ndarray
    axis: np.ndarray  # (V,) int64, and so are the rest
    value: np.ndarray
    near: np.ndarray
    far: np.ndarray
    bucket: np.ndarray

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """Bucket of samples of any lengths (N, A): (N,) int64."""
        node, rows = np.zeros(len(lengths), np.int64), np.arange(len(lengths))
        while True:
            short = lengths[rows, self.axis[node]] <= self.value[node]
            after = np.where(short, self.near[node], self.far[node])
            if np.array_equal(after, node):
                return self.bucket[node]
            node = after


class _Part(NamedTuple):
    """A bucket that may still be cut: its cells sorted by each axis, and the best cut of it."""

    orders: list[np.ndarray]  # an axis: (C,) int64
    saved: int  # tokens of padding that the cut saves
    axis: int
    last: int  # index of the last cell on its near side, in the order of `axis`


def make_buckets(lengths: np.ndarray, count: int, least: int = 1) -> Buckets:
    """Cut samples of several lengths into buckets that pad as little as may be.

    Best first, as a decision tree is grown: of all buckets and axes, the cut that saves the most
    padding is made next, until there are ``count``. A grid of quantiles pads half as much again.
    Samples of equal lengths are one cell, which stays together, so the time goes with the number of
    different lengths; each axis is sorted once.

    Args:
        lengths: (N, A) int64, N > 0, one column an axis; padding is that of all axes together.
        count: wanted buckets; there are fewer where no cut saves anything.
        least: samples that a bucket must have.
    Returns:
        Buckets with the longest lengths inside each as bounds, from short to long.
    """
    cell = np.zeros(len(lengths), np.int64)
    for column in lengths.T:
        cell = np.unique(cell * (int(column.max()) + 1) + column, return_inverse=True)[1]
    sizes = np.bincount(cell)
    first = np.full(len(sizes), len(lengths))
    np.minimum.at(first, cell, np.arange(len(lengths)))
    axes = [np.ascontiguousarray(column) for column in lengths[first].T]
    heap: list[tuple[int, int, _Part]] = []

    def grow(orders: list[np.ndarray], number: int) -> None:
        part = _cut(axes, sizes, orders, least)
        heapq.heappush(heap, (-part.saved, number, part))

    grow([np.argsort(column, kind="stable") for column in axes], 0)
    made, near = 0, np.zeros(len(sizes), bool)
    cuts: dict[int, tuple[int, int, int]] = {}  # node -> axis, longest of the near side, near child
    while len(heap) < count and heap[0][2].saved:
        _, node, (orders, _, axis, last) = heapq.heappop(heap)
        near[orders[axis][: last + 1]] = True
        near[orders[axis][last + 1 :]] = False
        cuts[node] = (axis, int(axes[axis][orders[axis][last]]), made + 1)
        for half in (True, False):
            made += 1
            grow([order[near[order] == half] for order in orders], made)
    cells = {node: part.orders[0] for _, node, part in heap}
    bounds = {node: [int(x[own].max()) for x in axes] for node, own in cells.items()}
    leaves = sorted(cells, key=lambda node: (sum(bounds[node]), int(first[cells[node]].min())))
    tree = np.zeros((5, made + 1), np.int64)
    for node in range(made + 1):
        axis, value, child = cuts.get(node, (0, 0, node))
        bucket = leaves.index(node) if node in cells else -1
        tree[:, node] = axis, value, child, child + (node in cuts), bucket
    return Buckets(np.array([bounds[node] for node in leaves], np.int64), *tree)


def _cut(axes: list[np.ndarray], sizes: np.ndarray, orders: list[np.ndarray], least: int) -> _Part:
    """The part with the cut in two that saves most padding; 0 saved where there is none."""
    best = _Part(orders, 0, 0, 0)
    n = int(sizes[orders[0]].sum())
    longest = [int(x[order[-1]]) for x, order in zip(axes, orders, strict=True)]
    for axis, order in enumerate(orders):
        own = axes[axis][order]
        at = np.flatnonzero(own[1:] != own[:-1])
        near = np.cumsum(sizes[order])[at]
        fits = (near >= least) & (n - near >= least)
        at, near = at[fits], near[fits]
        if not len(at):
            continue
        below, above = own[at], np.full(len(at), longest[axis])  # longest on each side
        for x in (x for other, x in enumerate(axes) if other != axis):
            ordered = x[order]
            below += np.maximum.accumulate(ordered)[at]
            above += np.maximum.accumulate(ordered[::-1])[::-1][at + 1]
        padded = near * below + (n - near) * above
        k = int(padded.argmin())
        saved = n * sum(longest) - int(padded[k])
        if saved > best.saved:
            best = _Part(orders, saved, axis, int(at[k]))
    return best
