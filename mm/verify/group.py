"""`mm verify` in the processes of a launcher (torchrun, srun, mpirun), on one machine or many.

Every process that the launcher started stays the parent of the processes that train: rank 0 leads
and tells the others over the launcher's store when to start one, and at which port they meet.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from mm.errors import UserError
from mm.launch import environment
from mm.reading import parse_json

POLL_S = 0.2
FOLDER_S = 20.0  # a network disk may show a new folder late
LEAVE_S = 30.0
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


class Store(Protocol):
    """What is used of PyTorch's stores."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


Train = Callable[[str, Path, Mapping[str, str], Callable[[], bool]], str]


class Group:
    """The ranks of a launcher's job.

    Args:
        store: that all of them share.
        train: runs one role in a folder with these variables until the last argument says so;
            returns why it failed, or ''.
    """

    def __init__(self, store: Store, rank: int, world: int, train: Train):
        self.store, self.rank, self.world, self._train = store, rank, world, train
        self._orders = 0

    def run(self, role: str, root: Path, poll: Callable[[], bool]) -> str:
        """Rank 0: train one role in all ranks. Returns why the first of them failed, or ''."""
        order, port = self._orders, environment.free_port()
        self._send({"role": role, "root": str(root), "port": port})
        is_over = self._is_over(order)
        environ = self._environ(port)
        self._report(order, self._train(role, root, environ, lambda: poll() or is_over()))
        ended = [f"verify/{order}/{rank}" for rank in range(self.world)]
        while not self.store.check(ended):
            time.sleep(POLL_S)
        if not self.store.check([f"verify/{order}/failed"]):
            return ""
        return self.store.get(f"verify/{order}/failed").decode()

    def end(self, code: int) -> None:
        """Rank 0: let the others end with ``code``; it may keep the store, so it leaves last."""
        self._send({"end": code})
        gone, limit = [f"verify/gone/{rank}" for rank in range(1, self.world)], LEAVE_S
        while limit > 0 and not self.store.check(gone):
            time.sleep(POLL_S)
            limit -= POLL_S

    def follow(self) -> int:
        """Every other rank: do as rank 0 says until the end. Returns the exit code."""
        while True:
            key, order = f"verify/order/{self._orders}", self._orders
            while not self.store.check([key]):
                time.sleep(POLL_S)
            self._orders += 1
            told = parse_json(self.store.get(key).decode())
            if "end" in told:
                self.store.set(f"verify/gone/{self.rank}", "")
                return told["end"]
            root = Path(told["root"])
            why = self._see(root / f"{told['role']}.yaml")
            environ = self._environ(told["port"])
            self._report(
                order, why or self._train(told["role"], root, environ, self._is_over(order))
            )

    def _send(self, order: dict[str, Any]) -> None:
        self.store.set(f"verify/order/{self._orders}", json.dumps(order))
        self._orders += 1

    def _report(self, order: int, why: str) -> None:
        """Say that this rank's part has ended; the first failure ends the parts of the others."""
        if why and not self.store.check([f"verify/{order}/failed"]):
            self.store.set(f"verify/{order}/failed", why)
        self.store.set(f"verify/{order}/{self.rank}", "")

    def _is_over(self, order: int) -> Callable[[], bool]:
        return lambda: self.store.check([f"verify/{order}/failed"])

    def _see(self, file: Path) -> str:
        """Wait for a file that rank 0 wrote. Returns what is wrong, or ''."""
        end = time.monotonic() + FOLDER_S
        while time.monotonic() < end:
            with suppress(OSError):
                os.listdir(file.parent)  # asks a network disk anew
                if file.exists():
                    return ""
            time.sleep(POLL_S)
        return (
            f"rank {self.rank} on {socket.gethostname()} does not see {file.parent}, which rank 0 "
            "made: out=FOLDER must be on a disk that all machines share"
        )

    def _environ(self, port: int) -> dict[str, str]:
        """Variables of this rank's training process: the same place, another meeting point."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TORCHELASTIC_", "GROUP_"))  # of the store that this one has
        }
        return kept | {"MASTER_PORT": str(port)}


def join(processes: int | None, train: Train) -> Group | None:
    """The group of this process's launcher; None where no launcher started several.

    Raises UserError where ``processes`` were asked for and the launcher started others.
    """
    me = environment.ranks()
    if me.world == 1:
        return None
    if processes not in (None, me.world):
        raise UserError(
            f"--processes {processes}: the launcher started {me.world}: leave the option out, or "
            "start as many"
        )
    from mm.trainer.engine.process_group import find_store  # torch: only where it is needed

    store, rank, world = find_store()
    return Group(store, rank, world, train)
