"""Whether the ranks of a run get on: from their heartbeats, and from what the nodes say of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm.launch import record
from mm.launch.launcher import Node

# A rank in another phase may take as long as `guard.hang_s` of the run lets it.
WATCHED = ("data", "step", "report")
LONGEST = 10  # times the longest step seen
FIRST = 3  # steps of a process that build and compile, and may take any time
STOPPED_S = 8.0  # a process that is stopped for so long is not stopped by chance
SILENT_S = 45.0  # a node that does not answer
WAITING = ("torch/distributed/", "deepspeed/comm/", "torch/autograd/")


class Hang(NamedTuple):
    """The node that holds the job up, its rank where one is known, and why."""

    node: str
    rank: int | None
    why: str


class Progress:
    """Of one attempt.

    ``hang_s``: seconds without any change in a step, at least, that count as a hang. Times are this
    machine's, so that clocks of nodes do not matter.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Sequence[Node],
        hang_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder, self._nodes, self._hang_s, self._clock = folder, nodes, hang_s, clock
        self._old = {_key(beat) for beat in record.beats(folder)}  # of the attempt before
        self._last: dict[int, tuple[Any, ...]] = {}
        self._changed = clock()
        self._longest = 0.0
        self._stopped: dict[str, dict[int, float]] = {}
        self._heard: dict[str, float] = {}
        self.beats: list[dict[str, Any]] = []

    def node_of(self, rank: int) -> str:
        """Ranks go by node, and on a node by process."""
        for node in self._nodes:
            if rank < node.processes:
                return node.name
            rank -= node.processes
        return self._nodes[-1].name

    def hear(self, node: str, words: Sequence[str]) -> None:
        """A node says that it is there, and of one of its ranks: process and state, as in ps."""
        now = self._heard[node] = self._clock()
        if len(words) == 2 and words[0].isdigit():
            stopped = self._stopped.setdefault(node, {})
            if words[1] in "Tt":
                stopped.setdefault(int(words[0]), now)
            else:
                stopped.pop(int(words[0]), None)

    def silence(self, node: str) -> float:
        """Seconds since a node last said anything; 0 when it never did."""
        return self._clock() - self._heard.get(node, self._clock())

    @property
    def step(self) -> int:
        """Steps done, as far as the ranks have said."""
        done = [b["step"] - (b["phase"] in ("data", "step")) for b in self.beats]
        return max(done, default=0)

    def look(self) -> Hang | None:
        """Read the heartbeats; the hang, where there is one."""
        now, was_warm = self._clock(), self._is_warm()
        self.beats = [b for b in record.beats(self._folder) if _key(b) not in self._old]
        seen = {beat["rank"]: _key(beat) for beat in self.beats}
        if seen != self._last:
            if was_warm:
                self._longest = max(self._longest, now - self._changed)
            self._last, self._changed = seen, now
        for node, stopped in self._stopped.items():
            for pid, since in stopped.items():
                if now - since >= STOPPED_S:
                    rank = next((b["rank"] for b in self.beats if b["pid"] == pid), None)
                    return Hang(node, rank, f"process {pid} is stopped (SIGSTOP)")
        for node, since in self._heard.items():
            if now - since > SILENT_S:
                return Hang(node, None, f"has not answered for {now - since:.0f} s")
        return self._stalled(now)

    def _stalled(self, now: float) -> Hang | None:
        lasted = now - self._changed
        if not self._hang_s or not self._is_warm():
            return None
        if lasted < max(self._hang_s, LONGEST * self._longest):
            return None
        inside = [b for b in self.beats if b["phase"] in WATCHED]
        if len(inside) < len(self.beats):  # saving, evaluating: the run's own guard watches
            return None
        guilty = min(inside, key=lambda b: (b["step"], b["phase"] == "step", b["since"]))
        why = f"nothing has changed for {lasted:.0f} s"
        return Hang(self.node_of(guilty["rank"]), guilty["rank"], why)

    def _is_warm(self) -> bool:
        return min((b.get("steps", 0) for b in self.beats), default=0) >= FIRST

    def accuse(self, hang: Hang, stacks: Path) -> Hang:
        """Of ranks in one phase of one step, the one whose stack waits for no other."""
        same = {(b["step"], b["phase"]) for b in self.beats}
        if len(same) == 1 and hang.why.startswith("nothing"):
            for beat in self.beats:
                text = read_stack(stacks, beat["rank"])
                if text and not any(place in text for place in WAITING):
                    return Hang(self.node_of(beat["rank"]), beat["rank"], hang.why)
        return hang


def read_stack(folder: Path, rank: int) -> str:
    """The main thread of a rank as it last dumped it; '' where it did not."""
    try:
        text = (folder / f"rank_{rank:04d}.stacks.txt").read_text(errors="replace")
    except OSError:
        return ""
    last = text.rpartition("Current thread")[2]
    return last.partition("\n\n")[0]


def _key(beat: dict[str, Any]) -> tuple[Any, ...]:
    return (beat["rank"], beat["pid"], beat["step"], beat["phase"], beat["since"])
