"""Bytes of the shards of a split: held in memory, or mapped, the latest few of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

MAPPED = 128  # shards at once: each takes a file handle


class ShardBytes:
    """The content of every shard by its number, read or mapped when it is first asked for.

    Args:
        path: of a shard; checks what it has to, and fetches what is behind a URL.
        in_memory: read shards and keep them all; else map them, and keep the latest `MAPPED`.
    """

    def __init__(self, path: Callable[[int], Path], in_memory: bool):
        self._path, self.in_memory = path, in_memory
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # a stream's thread, and whoever asks for a sample beside it

    def __call__(self, shard: int) -> np.ndarray:
        """(bytes,) uint8. A view of it keeps its map open."""
        with self._lock:
            found = self._kept.get(shard)
            if found is None:
                found = self._kept[shard] = self._read(self._path(shard))
                while len(self._kept) > MAPPED and not self.in_memory:
                    self._kept.popitem(last=False)
            elif not self.in_memory:
                self._kept.move_to_end(shard)
            return found

    def _read(self, path: Path) -> np.ndarray:
        if self.in_memory:
            return np.fromfile(path, np.uint8)
        return np.memmap(path, np.uint8, "r").view(np.ndarray)  # slices of a memmap cost more

    def __len__(self) -> int:
        """Shards that are held or mapped."""
        return len(self._kept)

    def clear(self) -> None:
        """Drop all of them."""
        with self._lock:
            self._kept.clear()
