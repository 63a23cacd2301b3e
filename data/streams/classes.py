"""Samples of a source by class, without an array of them: how many there are in every chunk.

The n-th sample of a class is found by its chunk, which is then looked at. N samples, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

CHUNK = 4096  # samples; what is kept is their counts
KEPT = 256  # chunks whose classes are kept


class Classes:
    """The samples of each class, in order.

    Args:
        n: samples.
        k: classes.
        of: class of the samples ``first`` to ``stop``: (stop - first,) int64 in [0, k). Called once
            for all of them, chunk by chunk, and again where a chunk is looked at.
    """

    def __init__(self, n: int, k: int, of: Callable[[int, int], np.ndarray]):
        self._n, self._of = n, of
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        chunks = -(-n // CHUNK)
        counts = np.empty((chunks, k), np.int64)
        for chunk in range(chunks):
            counts[chunk] = np.bincount(self._classes(chunk), minlength=k)
        self._until = np.cumsum(counts, 0)  # (chunks, K): of a class up to and with a chunk

    def count(self, k: int) -> int:
        """Samples of a class."""
        return int(self._until[-1, k])

    def select(self, k: int, numbers: np.ndarray) -> np.ndarray:
        """The samples of class ``k`` with these numbers in [0, count(k)). (B,) int64."""
        chunks = np.searchsorted(self._until[:, k], numbers, side="right")
        before = np.where(chunks > 0, self._until[chunks - 1, k], 0)
        out = np.empty(len(numbers), np.int64)
        for i, (chunk, n) in enumerate(
            zip(chunks.tolist(), (numbers - before).tolist(), strict=True)
        ):
            out[i] = chunk * CHUNK + np.flatnonzero(self._classes(chunk) == k)[n]
        return out

    def _classes(self, chunk: int) -> np.ndarray:
        if chunk not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            stop = min(self._n, (chunk + 1) * CHUNK)
            self._kept[chunk] = self._of(chunk * CHUNK, stop).astype(np.int16)
        return self._kept[chunk]


class OfClass:
    """The samples of one class as a sequence."""

    def __init__(self, classes: Classes, k: int):
        self._classes, self._k = classes, k

    def __len__(self) -> int:
        return self._classes.count(self._k)

    def __getitem__(self, n: int) -> int:
        if not 0 <= n < len(self):
            raise IndexError(f"sample {n} of {len(self)}")
        return int(self._classes.select(self._k, np.array([n]))[0])
