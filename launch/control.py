"""Find a launched run by its folder: how it is going, its logs, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.launch import record
from mm.launch.launcher import Launcher, quote
from mm.processes import is_alive
from mm.registry import LAUNCHERS

WAIT_S = 120.0


def _launcher(values: dict[str, Any]) -> Launcher:
    launcher = LAUNCHERS.parse(values["cluster"])
    assert isinstance(launcher, Launcher)
    return launcher


def status(folder: Path) -> dict[str, Any]:
    """Kind, state, world, how it ended, and the last word of every rank."""
    values = record.read(folder)
    state = values.get("state", "?")
    if state == "running" and values["host"] == socket.gethostname():
        if not is_alive(values["pid"]):
            state = "lost: the launcher is gone and has not said why"
    if state == "submitted":
        state = _launcher(values).status(values) or state
    out = {
        "kind": values["kind"],
        "state": state,
        "processes": values["world"],
        "nodes": ", ".join(values["nodes"]) or ", ".join(values.get("jobs", ())),
        "launched": f"{record.age(values['started'])} ago, on {values['host']}",
    }
    if "code" in values:
        out |= {"exit code": values["code"], "why": values["why"] or "all steps are done"}
    beats = [beat | {"since": record.age(beat["since"])} for beat in record.beats(folder)]
    return out | {"ranks": beats}


def logs(folder: Path, lines: int, rank: int | None = None) -> Iterator[str]:
    """The last lines of every rank's files. Raises UserError when there are none."""
    values = record.read(folder)
    newest: dict[int, list[Path]] = {}
    first = 0  # ranks go by node, and on a node by process
    for node in sorted((folder / "launch" / "logs").glob("node_*"), key=_number):
        attempts = sorted(node.glob("*/attempt_*"), key=lambda p: p.stat().st_mtime)
        here = sorted(attempts[-1].glob("[0-9]*"), key=_number) if attempts else []
        for local, place in enumerate(here):
            newest[first + local] = sorted(place.glob("std*.log"))
        first += len(here)
    if not newest:
        command = _launcher(values).log_command(values)
        how = f"; try: {quote(list(command))}" if command else ""
        raise UserError(f"{folder}: no log files of ranks yet{how}")
    for number, files in newest.items():
        if rank is None or rank == number:
            for file in files:
                text = file.read_text(errors="replace").splitlines()[-lines:]
                yield from (f"[rank {number} {file.stem}] {line}" for line in text)


def _number(path: Path) -> int:
    return int("".join(c for c in path.name if c.isdigit()) or 0)


def stop(folder: Path, now: bool = False) -> str:
    """End a job: after a checkpoint, or ``now``. Returns what happened; raises UserError."""
    values = record.read(folder)
    if values["state"] == "ended":
        return f"{folder}: has ended already ({values['why'] or 'all steps are done'})"
    commands = _launcher(values).stop_commands(values, now)
    for command in commands:
        done = subprocess.run(list(command), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{quote(list(command))}: {' '.join(done.stderr.split())}")
    if commands:
        return f"{folder}: asked the scheduler: {'; '.join(quote(list(c)) for c in commands)}"
    if values["host"] != socket.gethostname():
        raise UserError(
            f"{folder}: launched on {values['host']}; say there: mm launch stop {folder}"
        )
    pid = values["pid"]
    if not is_alive(pid):
        record.update(folder / "launch", state="ended", code=1, why="the launcher was lost")
        return f"{folder}: its launcher, process {pid}, is gone"
    for _ in range(2 if now else 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
    deadline = time.monotonic() + WAIT_S
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.2)
        if record.read(folder)["state"] == "ended":
            break
    ended = record.read(folder)
    if ended["state"] != "ended":
        raise UserError(f"{folder}: still running after {WAIT_S:.0f} s; mm launch stop --now")
    return f"{folder}: {ended['why'] or 'all steps are done'}"
