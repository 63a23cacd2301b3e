"""Start the nodes of a job from here, watch them, end all when one ends, tell why."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

from mm.launch import record
from mm.launch.console import Console
from mm.launch.forward import secrets
from mm.launch.launcher import Job, Node, exports

STOPPED = 75  # of `mm train`: a checkpoint is saved, the same command goes on
GRACE_S = 45.0
SSH_LOST = 255


class Outcome(NamedTuple):
    """How a job ended: exit code (0, 2, 75, else 1) and what there is to say."""

    code: int
    why: str


class _Channel:
    """A node's shell, and a thread that reads what it says."""

    def __init__(self, node: Node, first: str, console: Console):
        self.node, self.ended_at = node, 0.0
        self._process = subprocess.Popen(
            node.transport,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt of the terminal is for the launcher alone
        )
        self._thread = threading.Thread(target=self._read, args=(console,), daemon=True)
        self._thread.start()
        self.say(first + node.script)

    def say(self, text: str) -> None:
        """Write to the standard input of the node; nothing when it is gone."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()

    def end(self) -> None:
        """Close the standard input: the node ends its ranks."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()

    def kill(self) -> None:
        """End the process here, with all that it started on this machine."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, console: Console) -> None:
        stream: IO[bytes] | None = self._process.stdout
        assert stream is not None
        for line in stream:
            console.feed(self.node.name, line.decode(errors="replace").rstrip("\r\n"))

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and not self.ended_at:
            self.ended_at = time.monotonic()
        return code

    def drain(self) -> None:
        """Wait until what the node said has been read."""
        self._thread.join(5.0)


def run(job: Job, nodes: Sequence[Node], write: Callable[[str], None]) -> Outcome:
    """Run the nodes to their end.

    The first SIGINT, SIGTERM or SIGUSR1 asks the ranks for a checkpoint and an end, a second one
    ends them.
    """
    console = Console(write, len(nodes))
    asked = 0

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked += 1

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    first = exports(secrets(job.environ))  # never in a file nor on a command line
    channels = [_Channel(node, first, console) for node in nodes]
    try:
        _watch(channels, lambda: asked, write)
    finally:
        for channel in channels:
            channel.end()
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(c.poll() is None for c in channels):
            time.sleep(0.1)
        for channel in channels:
            channel.kill()
            channel.drain()
        for number, handler in before.items():
            signal.signal(number, handler)
    return _outcome(job, channels, console, asked > 0)


def _watch(
    channels: Sequence[_Channel], asked: Callable[[], int], write: Callable[[str], None]
) -> None:
    """Return when all nodes have ended well, one badly, or the user wants no more."""
    heard = 0
    while True:
        codes = [channel.poll() for channel in channels]
        if all(code is not None for code in codes):
            return
        if any(code not in (None, 0) for code in codes):
            # nodes that stop for the same reason do so within a moment of each other
            for _ in range(50):
                if all(channel.poll() is not None for channel in channels):
                    return
                time.sleep(0.1)
            return
        if asked() > heard:
            heard = asked()
            if heard > 1:
                return
            write("stopping after the step, with a checkpoint; once more to end at once")
            channels[0].say("stop\n")  # the ranks agree among themselves
        time.sleep(0.1)


def _outcome(job: Job, channels: Sequence[_Channel], console: Console, asked: bool) -> Outcome:
    codes = [channel.poll() for channel in channels]
    if all(code == 0 for code in codes):
        return Outcome(0, "")
    reported = {code for _, code in console.exit_codes} | {
        code for code in codes if code == STOPPED
    }
    # torchrun ends with 1 whatever its ranks end with; it tells their codes
    if STOPPED in reported and not reported - {STOPPED, -signal.SIGTERM}:
        return Outcome(STOPPED, "stopped with a checkpoint; the same command goes on")
    bad = [c for c in channels if c.poll() != 0]
    guilty = min(bad, key=lambda c: c.ended_at or float("inf"))
    lost = [c.node.name for c in bad if c.poll() == SSH_LOST]
    said = console.first_error()
    killed = console.first_kill()
    if killed is not None and (said is None or said.is_consequence):
        node, number = killed
        name = signal.Signals(number).name
        return Outcome(1, f"{node}: a rank was ended by {name}{_last(job, node)}")
    if lost and (said is None or said.is_consequence):
        text = said.lines[-1] if said and said.node in lost else "the connection is lost"
        return Outcome(1, f"{lost[0]}: {text} (ssh exits with {SSH_LOST}); try: ssh {lost[0]} true")
    if said is not None:
        place = f"{said.node} rank {said.rank}" if said.rank else said.node
        is_input = said.lines[0].startswith("mm: ")
        text = said.lines[0].removeprefix("mm: ") if is_input else "\n".join(said.lines)
        return Outcome(2 if is_input else 1, f"{place}: {text}")
    if asked:
        return Outcome(1, "ended at once; the newest checkpoint is where the same command goes on")
    return Outcome(1, f"{guilty.node.name}: ended with exit code {guilty.poll()}, and said nothing")


def _last(job: Job, node: str) -> str:
    """What the ranks of the run last said they were doing, in one line."""
    beats = record.beats(job.folder)
    if not beats:
        return ""
    behind = min(beats, key=lambda beat: (beat["step"], beat["since"]))
    return f" (rank {behind['rank']} was last in {behind['phase']} of step {behind['step']})"
