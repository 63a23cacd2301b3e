"""One console of many ranks: lines with their rank, and of all errors the first alone."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import NamedTuple

_RANK = re.compile(r"\[rank (\d+)\] ?")
_ERROR = re.compile(r"Traceback \(most recent call last\)|^mm: ")
# What a rank says that only lost another one, or was told to stop.
_CONSEQUENCE = re.compile(
    r"Connection (reset|closed|refused)|closed by (remote )?peer|Broken pipe|SIGTERM"
    r"|SignalException"
    r"|the main process stopped|NCCL communicator was aborted|DistBackendError|recvValue failed"
    r"|DistNetworkError|Timed out waiting|heartbeat"
)
# torchrun's own report of a failure, and what PyTorch's runtime logs about it.
_TORCHRUN = re.compile(
    r"^(\[?[EWI]\d{4} |[EWI]\d{4} \d\d:\d\d|=+$|-+$|\[W\d+ )|torch.distributed.elastic"
)
_EXITS = re.compile(r"exitcode\s*:\s*(-?\d+)")


class Said(NamedTuple):
    """An error as a rank told it."""

    node: str
    rank: str
    lines: list[str]

    @property
    def is_consequence(self) -> bool:
        return any(_CONSEQUENCE.search(line) for line in self.lines[-3:])


class Console:
    """Takes the lines of all nodes; ``write`` gets those that a person sees."""

    def __init__(self, write: Callable[[str], None], n_nodes: int):
        self._write, self._n_nodes = write, n_nodes
        self._lock = threading.Lock()
        self._errors: list[Said] = []
        self._open: dict[tuple[str, str], Said] = {}
        self.exit_codes: list[tuple[str, int]] = []  # that torchrun reported: node, code

    def feed(self, node: str, line: str) -> None:
        """One line of a node, without its end."""
        with self._lock:
            self._feed(node, line)

    def _feed(self, node: str, line: str) -> None:
        found = _RANK.match(line)
        if found is None:
            if code := _EXITS.search(line):
                self.exit_codes.append((node, int(code[1])))
            if _ERROR.search(line) or (node, "") in self._open:
                self._hold(node, "", line)
            elif line.strip() and not _TORCHRUN.search(line):
                self._write(f"[{node}] {line}" if self._n_nodes > 1 else line)
            return
        rank, text = found[1], line[found.end() :]
        if _ERROR.search(text) or ((node, rank) in self._open and not _TORCHRUN.match(text)):
            self._hold(node, rank, text)
        elif not _TORCHRUN.match(text):
            place = f"{node} " if self._n_nodes > 1 else ""
            self._write(f"[{place}rank {rank}] {text}")

    def _hold(self, node: str, rank: str, text: str) -> None:
        """Keep a line of an error: a rank's error goes on to the end of what the rank says."""
        key = (node, rank)
        if key not in self._open:
            self._open[key] = Said(node, rank, [])
            self._errors.append(self._open[key])
        self._open[key].lines.append(text)

    def first_error(self) -> Said | None:
        """The error that came first among those that no other one explains, else the first."""
        with self._lock:
            ranks = [e for e in self._errors if e.rank] or self._errors
            own = [error for error in ranks if not error.is_consequence]
            return (own or ranks or [None])[0]

    def first_kill(self) -> tuple[str, int] | None:
        """Node and signal of a rank that was killed from outside, the first that is known."""
        with self._lock:
            found = [(node, -code) for node, code in self.exit_codes if code < 0 and code != -15]
        return found[0] if found else None
