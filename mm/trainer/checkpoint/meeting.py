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

TIMEOUT_S = 1800.0  # for a process that has not come yet
BEAT_S, SILENT_S = 1.0, 40.0  # each process shows that it lives; one that is silent so long is gone
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
        self._seen: dict[int, tuple[bytes, float]] = {}  # last beat of others, and when it came
        self._over = threading.Event()
        if store is not None:
            threading.Thread(target=self._beat, daemon=True, name="save-beat").start()

    def _beat(self) -> None:
        """Show the others that this process lives, while its files are written."""
        count = 0
        while True:
            count += 1
            try:
                self._store.set(self._key("beat", self.rank), str(count))
            except RuntimeError:  # the process that keeps the store is gone: `hear` says so
                return
            if self._over.wait(BEAT_S):
                return

    def end(self) -> None:
        """This process has nothing else to say."""
        self._over.set()
        self.forget(["beat"])

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
        looked = begun
        while not self._all_there(keys):
            now = time.monotonic()
            if now - looked > BEAT_S:
                looked = now
                self._look_at([r for r, k in zip(ranks, keys, strict=True) if not self._there(k)])
            if not threading.main_thread().is_alive():
                ended = ended or now
            if now - begun > TIMEOUT_S or (ended is not None and now - ended > GRACE_S):
                silent = [r for r, key in zip(ranks, keys, strict=True) if not self._there(key)]
                raise Gone(f"process {silent[0] if silent else '?'} did not finish its part")
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
        return [parse_json(self._store.get(key)) for key in keys]

    def forget(self, words: Iterable[str], rank: int | None = None) -> None:
        """Take back what this process, or ``rank``, said, when all have heard it."""
        if self._store is None:
            return
        for about in words:
            with contextlib.suppress(RuntimeError):  # a store that knows no taking back
                self._store.delete_key(self._key(about, self.rank if rank is None else rank))

    def leave(self, last: str) -> None:
        """Say that ``last`` was heard.

        Process 0 keeps the words of all: it waits until they have heard it, as it may end next.
        """
        self.tell("left", True)
        if self.rank or self._store is None:
            return
        with contextlib.suppress(Gone):  # who died since has nothing to lose
            self.hear("left", range(self.world))
        for rank in range(self.world):
            self.forget(["left"], rank)
        self.forget([last])

    def _all_there(self, keys: list[str]) -> bool:
        try:
            return self._store.check(keys)
        except RuntimeError as error:
            raise Gone("process 0, which keeps the words of all, is gone") from error

    def _look_at(self, ranks: Iterable[int]) -> None:
        """Raise `Gone` for a process that came and beats no more."""
        for rank in ranks:
            key, now = self._key("beat", rank), time.monotonic()
            if not self._there(key):
                continue
            beat = self._store.get(key)
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, now
            elif now - self._seen[rank][1] > SILENT_S:
                raise Gone(f"process {rank} is gone: it showed no life for {SILENT_S:.0f} s")

    def _there(self, key: str) -> bool:
        return self._store.check([key])

    def _key(self, about: str, rank: int) -> str:
        return f"mm/save/{self.name}/{about}/{rank}"
