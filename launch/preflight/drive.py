"""Run the preflight from here: an agent on every host, rounds in step, one table."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets as random
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm.launch import source
from mm.launch.forward import public, secrets
from mm.launch.launcher import Job, exports
from mm.launch.preflight.agent import MARK
from mm.launch.preflight.check import FIX, Asked, Endpoint, Row, Seen, copy_command, leave_out
from mm.launch.preflight.checks import CHECKS, ROUNDS, judge
from mm.launch.preflight.network import MEET_S
from mm.launch.preflight.software import FOLDERS
from mm.reading import parse_json

START_S, ROUND_S = 40.0, 60.0
CLOCK_ROUNDS = 3


class Report(NamedTuple):
    """What the preflight found."""

    rows: list[Row]
    hosts: int
    seconds: float

    @property
    def to_mend(self) -> list[Row]:
        return [row for row in self.rows if row.light == FIX]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        rows = [row._asdict() for row in self.rows]
        return {"hosts": self.hosts, "seconds": self.seconds, "rows": rows}


class Agent:
    """The agent of one host: what it says is read by a thread of its own."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.said: queue.Queue[str] = queue.Queue()
        self.complaints: list[str] = []
        self._reader: threading.Thread | None = None

    def listen(self, lines: Iterable[str]) -> None:
        """Read its lines from now on."""
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._reader.start()

    def _read(self, lines: Iterable[str]) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in lines:
                if line.startswith(MARK):
                    self.said.put(line.removeprefix(MARK))
                else:  # what a login shell prints, and errors of a shell
                    self.complaints.append(line.strip())

    def write(self, text: str) -> None:
        """Send it a line, or a script; nothing where it is gone."""
        raise NotImplementedError

    @property
    def code(self) -> int | None:
        """Exit code, None while it lives."""
        return None if self._reader is not None and self._reader.is_alive() else 1

    def answer(self, deadline: float) -> tuple[Any, float] | None:
        """The next answer and when it came; None when the agent is gone or late."""
        while True:
            try:
                return parse_json(self.said.get(timeout=0.05)), time.time()
            except queue.Empty:
                reads = self._reader is not None and self._reader.is_alive()
                is_over = self.code is not None and not reads
                if (is_over and self.said.empty()) or time.monotonic() > deadline:
                    return None

    @property
    def why(self) -> str:
        """What is known about an agent that does not answer."""
        text = next((line for line in reversed(self.complaints) if line), "")
        if self.code is None:
            return f"no answer in time{f'; last: {text[:160]}' if text else ''}"
        return text[:200] or f"ended with exit code {self.code} and said nothing"

    def end(self) -> None:
        """Let it go."""


class _Shell(Agent):
    """An agent that a shell on its host starts."""

    def __init__(self, endpoint: Endpoint, first: str):
        super().__init__(endpoint)
        self._process = subprocess.Popen(
            endpoint.transport,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.listen(self._process.stdout)
        threading.Thread(target=self._read_complaints, daemon=True).start()
        self.write(first)

    def write(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(text)
            self._process.stdin.flush()

    def _read_complaints(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.complaints.append(line.strip())

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def run(
    endpoints: Sequence[Endpoint],
    job: Job | None,
    *,
    address: str,
    port: int,
    folder: Path,
    python: str,
    workdir: Path,
    env: Mapping[str, str],
    environ: Mapping[str, str],
) -> Report:
    """Check all hosts at once. Nothing is left on them."""
    begun = time.monotonic()
    script = (
        f"{exports(secrets(dict(environ)))}{{\ncd {shlex.quote(str(workdir))} || exit 3\n"
        f"{exports(public(dict(environ)) | dict(env))}"
        f"exec {shlex.quote(python)} -m mm.launch.preflight.agent\n}}\n"
    )
    nonce = random.token_hex(4)
    agents = {i: _Shell(endpoint, script) for i, endpoint in enumerate(endpoints)}
    asked = {
        i: Asked(
            i,
            len(endpoints),
            address,
            port,
            endpoint.processes,
            job.config if job else None,
            job.overrides if job else (),
            str(folder),
            nonce,
        ).__dict__
        for i, endpoint in enumerate(endpoints)
    }
    try:
        rows = examine(agents, asked)
    finally:
        for agent in agents.values():
            agent.end()
    return Report(rows, len(endpoints), time.monotonic() - begun)


def examine(agents: Mapping[int, Agent], asked: Mapping[int, Any]) -> list[Row]:
    """All rounds with these agents, and what comes of it; ``asked``: a node's `Asked` as a dict."""
    endpoints = tuple(agents[i].endpoint for i in sorted(agents))
    seen, answered = _rounds(endpoints, agents, asked)
    rows = [_lost(endpoints, i, agents[i].why) for i in agents if i not in answered]
    return rows + judge(seen)


def _rounds(
    hosts: tuple[Endpoint, ...], agents: Mapping[int, Agent], asked: Mapping[int, Any]
) -> tuple[Seen, set[int]]:
    """Clocks, then the rounds of all checks: what was seen, and which nodes answered to the end."""
    skew: dict[int, float] = {}
    best: dict[int, float] = {}
    for turn in range(CLOCK_ROUNDS):
        for i, agent in agents.items():
            if turn and i not in skew:
                continue
            if turn == 0:
                agent.write(json.dumps({"round": -1}) + "\n")  # all start at once
        deadline = time.monotonic() + START_S
        for i, agent in agents.items():
            if turn and i not in skew:
                continue
            sent = time.time()
            if turn:
                agent.write(json.dumps({"round": -1}) + "\n")
            found = agent.answer(deadline)
            if found is None:
                skew.pop(i, None)
                continue
            said, came = found
            way = came - sent if turn else float("inf")  # the first answer waited for the start
            if way <= best.get(i, float("inf")):
                best[i], skew[i] = way, said["time"] - (sent + came) / 2
    values: dict[str, list[dict[int, Any]]] = {}
    there = set(skew)
    for number in range(ROUNDS):
        told = {name: steps[-1] for name, steps in values.items() if len(steps) == number}
        without: list[str] = []
        if number == ROUNDS - 1:  # where the nodes meet, for which they wait long
            without = _without(Seen(hosts, values, skew), len(there) == len(hosts))
        for i in there:
            words = {"round": number, "asked": asked[i], "told": told, "without": without}
            agents[i].write(json.dumps(words) + "\n")
        deadline = time.monotonic() + ROUND_S + (MEET_S if number == ROUNDS - 1 else 0)
        for i in sorted(there):
            found = agents[i].answer(deadline)
            if found is None:
                there.discard(i)
                continue
            for name, value in found[0].items():
                steps = values.setdefault(name, [])
                while len(steps) <= number:
                    steps.append({})
                steps[number][i] = value
    # the answers of the first round that a check has a step in are its first ones
    found = {name: [s for s in steps if s] for name, steps in values.items()}
    return Seen(hosts, found, skew), there


def _without(seen: Seen, complete: bool) -> list[str]:
    """Checks that have no sense: a node is missing, or what they need is to be mended."""
    out = []
    for check in CHECKS:
        needed = [other for other in CHECKS if other.name in check.needs and other.steps]
        known = [other for other in needed if other.name in seen.values]
        broken = any(row.light == FIX for other in known for row in other.judge(seen))
        if check.needs and (not complete or broken):
            out.append(check.name)
    return out


def _lost(endpoints: Sequence[Endpoint], i: int, why: str) -> Row:
    """A host whose agent did not start or did not last."""
    host = endpoints[i]
    if "No module named" in why and "mm.launch" in why:
        good = endpoints[0 if i else min(1, len(endpoints) - 1)]
        root = str(source.PACKAGE.parent)
        return Row(
            "code", host.name, FIX, f"other code: {why}", copy_command(good, host, root, FOLDERS)
        )
    rest = "" if len(endpoints) > 1 else host.on("true")
    return Row("host", host.name, FIX, why, rest or leave_out(host))
