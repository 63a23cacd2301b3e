"""What every rank is doing, on disk: a file per rank, and the verdict when one hangs or dies.

    <run folder>/health/rank_0000.json        rank, pid, host, step, steps, phase, since, keys,
                                              collectives
    <run folder>/health/rank_0000.stacks.txt  stacks of all threads, when it hung or got a SIGUSR2

A phase change is one `pwrite` (some microseconds). A watching thread of each rank writes how many
collectives it has begun, dumps the stacks and ends the process when a phase lasts longer than
``guard.hang_s``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mm.trainer.callbacks.base import Callback, Training

log = logging.getLogger("mm.trainer")

HUNG = 76  # exit code of a rank that hung, or waited too long for another
SIZE = 4096  # one record is written at once and fills a page: a reader sees a whole one
KEYS = 32
# They may last; only rank 0 works in them.
UNWATCHED = ("start", "stage", "evaluate", "export", "end")
# A rank in these may be waiting for another one.
SHARED = ("step", "held_out", "save")


class Heartbeat(Callback):
    """Of one rank: says each phase of the run as it begins."""

    def __init__(self, folder: Path, rank: int, hang_s: float):
        self.folder, self.rank, self.hang_s = folder, rank, hang_s
        folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(_path(folder, rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._beat: dict[str, Any] = {}
        self._writing = threading.Lock()
        self._first: int | None = None  # step that this process began with
        self._begun = time.monotonic()
        self.phase("start", 0)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # What a launcher asks for when nothing moves: it works while the main thread is in C.
        self._stacks = (folder / f"rank_{rank:04d}.stacks.txt").open("a")
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        if hang_s:
            self._thread = threading.Thread(target=self._watch, name="mm-watch", daemon=True)
            self._thread.start()

    def __enter__(self) -> Heartbeat:
        return self

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        self.phase(name, step, keys)

    def phase(self, name: str, step: int, keys: Sequence[str] = ()) -> None:
        """Say what begins now. ``keys``: samples of the batch."""
        self._begun = time.monotonic()
        if name == "step" and self._first is None:
            self._first = step
        beat = {
            "rank": self.rank,
            "pid": self._pid,
            "host": self._host,
            "step": step,
            "steps": 0 if self._first is None else step - self._first,  # done by this process
            "phase": name,
            "since": time.time(),
            "keys": [key[:80] for key in keys[:KEYS]],
        }
        with self._writing:
            self._write({**beat, "collectives": self._beat.get("collectives", 0)})

    def _write(self, beat: dict[str, Any]) -> None:
        self._beat = beat
        os.pwrite(self._fd, json.dumps(beat).encode()[:SIZE].ljust(SIZE), 0)

    def _count(self) -> None:
        """Say how many collectives this rank has begun: who waits in one has begun it."""
        collectives = begun_collectives()
        with self._writing:
            if collectives != self._beat["collectives"]:
                self._write({**self._beat, "collectives": collectives})

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """End; after a lost connection, name the rank that it was to."""
        if isinstance(error, RuntimeError) and len(read(self.folder)) > 1:
            time.sleep(0.5)  # until a dying rank is dead
            log.error("%s", verdict(self.folder))
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        self.phase("end", self._beat["step"])
        os.close(self._fd)
        faulthandler.unregister(signal.SIGUSR2)
        if not os.fstat(self._stacks.fileno()).st_size:
            Path(self._stacks.name).unlink(missing_ok=True)
        self._stacks.close()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.hang_s / 4)):
            self._count()
            beat, begun = self._beat, self._begun
            lasted = time.monotonic() - begun
            # ranks in a shared phase give the guilty one a head start to speak for itself
            patience = self.hang_s * (1.25 if beat["phase"] in SHARED else 1.0)
            if beat["phase"] in UNWATCHED or lasted < patience:
                continue
            with (self.folder / f"rank_{self.rank:04d}.stacks.txt").open("w") as file:
                file.write(f"{json.dumps(beat)}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            log.error("hang: %s (stacks: %s)", verdict(self.folder), self.folder)
            logging.shutdown()
            os._exit(HUNG)


def begun_collectives() -> int:
    """How many collectives this process has begun, in all groups together; 0 where none are."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0
    begun = 0
    groups: list[Any] = list(torch.distributed.distributed_c10d._world.pg_map)
    for group in groups:
        with contextlib.suppress(RuntimeError):  # a backend that does not count, as a rehearsal's
            begun += group._get_sequence_number_for_group()
    return begun


def read(folder: Path) -> list[dict[str, Any]]:
    """The last word of every rank, by rank."""
    beats = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            beats.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return beats


def clear(folder: Path) -> None:
    """Remove the files of an earlier job: it may have had more ranks."""
    for path in folder.glob("rank_*"):
        path.unlink(missing_ok=True)


def verdict(folder: Path) -> str:
    """Which rank holds the job up, in one line.

    A dead one, else the one furthest behind that does not wait for others: of ranks in the same
    phase of a step, which may all wait, the one that has begun the fewest collectives.
    """
    beats = read(folder)
    if not beats:
        return "no rank wrote a heartbeat"
    dead = [b for b in beats if _dead(b)]
    place = lambda b: (b["step"], b["phase"] in SHARED, b.get("collectives", 0), b["since"])
    behind = sorted(beats, key=place)
    guilty = dead[0] if dead else behind[0]
    what = "is dead" if dead else f"has been in it for {time.time() - guilty['since']:.0f} s"
    keys = f", samples {', '.join(guilty['keys'][:4])}" if guilty["keys"] else ""
    others = [f"{b['rank']} in '{b['phase']}'" for b in beats if b is not guilty][:8]
    return (
        f"rank {guilty['rank']} (process {guilty['pid']} on {guilty['host']}) {what}: "
        f"phase '{guilty['phase']}' of step {guilty['step']}{keys}"
        + (f"; others: {', '.join(others)}" if others else "")
    )


def _dead(beat: dict[str, Any]) -> bool:
    if beat["phase"] == "end" or beat["host"] != socket.gethostname():
        return False
    try:
        state = Path(f"/proc/{beat['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state in "ZX"  # killed, and not yet waited for


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:04d}.json"
