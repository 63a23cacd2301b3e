"""What a check is: functions that look on every node, and one that judges what all of them saw."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

OK, WARN, FIX = "OK", "WARN", "FIX"
ALL = "all"  # hosts


@dataclass(frozen=True)
class Asked:
    """What a node is told about the job and its own place in it."""

    rank: int
    nodes: int
    address: str  # of the first node
    port: int
    processes: int  # of this node
    config: str | None
    overrides: tuple[str, ...]
    folder: str  # where runs are written
    nonce: str  # of this preflight


@dataclass(frozen=True)
class Endpoint:
    """A host as this machine reaches it."""

    name: str
    transport: tuple[str, ...]  # its standard input is a shell there
    processes: int
    exclude: str = "cluster.exclude={}"  # the override that starts without it

    def on(self, command: str) -> str:
        """The line that runs a command there, as it would be typed here."""
        if self.transport[0] != "ssh":
            return command
        return shlex.join([*self.transport[:-1], command])


class Row(NamedTuple):
    """A line of the table; ``mend`` is the command or the override that mends it."""

    check: str
    host: str
    light: str
    found: str
    mend: str = ""


class Seen(NamedTuple):
    """What the nodes saw.

    ``values`` holds a list a check: of each step the answers by number of the node. A node that did
    not answer is left out; a step that failed there has ``{"error": text}``.
    """

    hosts: tuple[Endpoint, ...]
    values: Mapping[str, Sequence[Mapping[int, Any]]]
    skew_s: Mapping[int, float]  # of a node's clock against this machine's, without the way there

    def of(self, check: str, step: int = 0) -> dict[int, Any]:
        """Answers of one step, those that failed left out."""
        steps = self.values.get(check, ())
        found = steps[step] if step < len(steps) else {}
        return {i: v for i, v in found.items() if not is_failure(v)}


Step = Callable[[Asked, Mapping[int, Any]], Any]  # this node, and what all said in the step before


class Check(NamedTuple):
    """``steps`` run on every node, each after all have done the one before; None: not this time."""

    name: str
    steps: tuple[Step | None, ...]
    judge: Callable[[Seen], Iterator[Row]]
    needs: tuple[str, ...] = ()  # checks; where one of them is to be mended, this has no sense


def is_failure(value: Any) -> bool:
    """Whether a node's answer says that its step itself failed."""
    return isinstance(value, Mapping) and "error" in value


def common(values: Mapping[int, Hashable]) -> Any:
    """What most nodes say; of two equally frequent, what the earlier node says."""
    first = {}
    for i in sorted(values):
        first.setdefault(values[i], i)
    counts = Counter(values.values())
    return max(counts, key=lambda v: (counts[v], -first[v]))


def copy_command(source: Endpoint, to: Endpoint, folder: str, names: Sequence[str] = (".",)) -> str:
    """A line that copies files of a folder from one host to another through this machine."""
    where = shlex.quote(folder)
    pack = source.on(f"tar -C {where} -chf - {shlex.join(names)}")
    return f"{pack} | {to.on(f'mkdir -p {where} && tar -C {where} -xf -')}"


def leave_out(host: Endpoint) -> str:
    """The override that starts without a host."""
    return host.exclude.format(host.name)


def n_bytes(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    return ""
