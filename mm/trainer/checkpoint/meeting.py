"""What processes tell each other about a save: small words through the group's store.

No collective: a thread in the background may use it while the main one trains.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from mm.reading import parse_json

TIMEOUT_S = 1800.0
GRACE_S = 20.0  # for the others, once this process has nothing else to do: it is about to end
POLL_S = (0.002, 0.1)  # first and longest pause between two looks

_saves = 0  # of this process: all have made as many


class Gone(Exception):
    """Another process said nothing in time."""


class Meeting:
    """The processes of one save.

    Args:
        rank: this process among ``world``.
        store: where all put their words; None: this process is alone.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None, name: str = ""):
        self.rank, self.world, self.name = rank, world, name or f"alone_{os.getpid()}"
        self._store = store
        self._own: dict[str, Any] = {}

    @classmethod
    def of_all(cls) -> Meeting:
        """The next one of all processes; each of them calls it as often."""
        from torch.distributed.distributed_c10d import _get_default_store

        global _saves
        _saves += 1
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(name=f"{_saves}")
        store = _get_default_store()
        return cls(dist.get_rank(), dist.get_world_size(), store, f"{_saves}")

    def tell(self, about: str, value: Any) -> None:
        """Say ``value`` (JSON-able) to all."""
        self._own[about] = value
        if self._store is not None:
            self._store.set(self._key(about, self.rank), json.dumps(value))

    def hear(self, about: str, ranks: Iterable[int]) -> list[Any]:
        """What some processes said, by rank; waits until they have.

        Raises `Gone`.
        """
        ranks = list(ranks)
        if self._store is None:
            return [self._own[about] for _ in ranks]
        keys = [self._key(about, rank) for rank in ranks]
        begun, pause, ended = time.monotonic(), POLL_S[0], None
        while not self._store.check(keys):
            now = time.monotonic()
            if not threading.main_thread().is_alive():
                ended = ended or now
            if now - begun > TIMEOUT_S or (ended is not None and now - ended > GRACE_S):
                silent = [r for r, key in zip(ranks, keys, strict=True) if not self._there(key)]
                raise Gone(f"process {silent[0] if silent else '?'} did not finish its part")
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
        return [parse_json(self._store.get(key)) for key in keys]

    def forget(self, words: Iterable[str]) -> None:
        """Take back what this process said, when all have heard it."""
        if self._store is None:
            return
        for about in words:
            with contextlib.suppress(RuntimeError):  # a store that knows no taking back
                self._store.delete_key(self._key(about, self.rank))

    def _there(self, key: str) -> bool:
        return self._store.check([key])

    def _key(self, about: str, rank: int) -> str:
        return f"mm/save/{self.name}/{about}/{rank}"
