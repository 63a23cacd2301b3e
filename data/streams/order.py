"""Which sample each draw of a source is: a permutation an epoch, computed where it is asked for.

Nothing as long as the source is stored: a keyed bijection (`permute`) takes a place in the epoch to
a sample, or first to a shard and then to a place in a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm.data.streams.shuffle import key_of, permute


class SourceOrder:
    """The samples of one source by draw; every epoch has an order of its own.

    Args:
        seed, source: of the order.
        n: samples of the source.
        shard_sizes: samples of its shards, in order; they sum to ``n``.
        window: samples that are mixed with each other, shard after shard; 0: all.
    """

    def __init__(self, seed: int, source: int, n: int, shard_sizes: Sequence[int], window: int):
        self.n, self._key, self._window = n, (seed, "source", source), window
        self._sizes = np.asarray(shard_sizes, np.int64) if window else np.empty(0, np.int64)
        self._windows: dict[int, Windows] = {}

    def __call__(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample of each draw; ``draws`` and both of them (D,) int64."""
        epochs, places = np.divmod(np.asarray(draws, np.int64), self.n)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            key = key_of(*self._key, epoch)
            if self._window:
                samples[here] = self._of_epoch(epoch, key)(places[here])
            else:
                samples[here] = permute(places[here], self.n, key)
        return epochs, samples

    def _of_epoch(self, epoch: int, key: int) -> Windows:
        if epoch not in self._windows:
            while len(self._windows) > 3:  # rows are in at most a few epochs at once
                self._windows.pop(next(iter(self._windows)))
            self._windows[epoch] = Windows(self._sizes, self._window, key)
        return self._windows[epoch]


class Windows:
    """An order that reads shard after shard: shards permuted, then samples within a window.

    Args:
        sizes: (S,) int64: samples of every shard.
        window: samples that are mixed with each other.
        key: of the order.
    """

    def __init__(self, sizes: np.ndarray, window: int, key: int):
        self.n, self.window, self.key = int(sizes.sum()), window, key
        self._order = permute(np.arange(len(sizes)), len(sizes), key)
        self._first = np.concatenate([[0], np.cumsum(sizes)])[:-1][self._order]
        self._ends = np.cumsum(sizes[self._order])
        self._sizes = sizes[self._order]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The sample at every place, both (D,) int64; over all places a permutation."""
        out = np.empty_like(places)
        numbers = places // self.window
        for number in np.unique(numbers).tolist():
            here, start = numbers == number, number * self.window
            size = min(self.window, self.n - start)
            mixed = permute(places[here] - start, size, self.key ^ (number + 1))
            out[here] = self._in_line(mixed + start)
        return out

    def _in_line(self, at: np.ndarray) -> np.ndarray:
        """Samples at places of the permuted shards, one after the other."""
        shard = np.searchsorted(self._ends, at, side="right")
        return at - (self._ends[shard] - self._sizes[shard]) + self._first[shard]
