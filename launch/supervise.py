"""Start the nodes of a job from here, watch them, end all when one ends, tell why."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from mm.launch.console import Console
from mm.launch.forward import secrets
from mm.launch.launcher import Job, Node, exports
from mm.launch.progress import Hang, Progress, read_stack
from mm.launch.torchrun import STATE

STOPPED = 75  # of `mm train`: a checkpoint is saved, the same command goes on
GRACE_S = 45.0
SSH_LOST = 255
ALIVE_S = 4.0  # between two questions to a node


class Outcome(NamedTuple):
    """How a job ended: exit code (0, 2, 75, else 1) and what there is to say."""

    code: int
    why: str
    node: str = ""  # that is to blame, where one is known
    step: int = 0  # done, as far as the ranks said
    silent_s: float = 0.0  # since that node was last heard of


class Signals:
    """While entered, SIGINT, SIGTERM and SIGUSR1 are counted and do nothing else."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: Any) -> None:
        self.count += 1

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Channel:
    """A node's shell, and a thread that reads what it says."""

    def __init__(self, node: Node, first: str, console: Console, progress: Progress):
        self.node, self.ended_at = node, 0.0
        self._process = subprocess.Popen(
            node.transport,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt of the terminal is for the launcher alone
        )
        self._thread = threading.Thread(target=self._read, args=(console, progress), daemon=True)
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

    def _read(self, console: Console, progress: Progress) -> None:
        stream: IO[bytes] | None = self._process.stdout
        assert stream is not None
        for data in stream:
            line = data.decode(errors="replace").rstrip("\r\n")
            if line.startswith(STATE):
                progress.hear(self.node.name, line.split()[1:])
            else:
                console.feed(self.node.name, line)

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and not self.ended_at:
            self.ended_at = time.monotonic()
        return code

    def drain(self) -> None:
        """Wait until what the node said has been read."""
        self._thread.join(5.0)


def run(
    job: Job,
    nodes: Sequence[Node],
    write: Callable[[str], None],
    signals: Signals,
    hang_s: float = 0.0,
    on_step: Callable[[int], None] | None = None,
) -> Outcome:
    """Run the nodes to their end.

    The first signal asks the ranks for a checkpoint and an end, a second one ends them.

    Args:
        hang_s: of `Progress`; 0: the run's own guard alone watches its ranks.
        on_step: is told the steps that are done, every few seconds.
    """
    console, progress = Console(write, len(nodes)), Progress(job.folder, nodes, hang_s)
    first = exports(secrets(job.environ))  # never in a file nor on a command line
    channels = [_Channel(node, first, console, progress) for node in nodes]
    hang, heard = None, signals.count
    try:
        hang = _watch(channels, signals, write, progress, on_step or (lambda step: None))
        if hang is not None:
            hang = _with_stack(hang, channels, progress, job.folder / "health")
    finally:
        if signals.count == heard:  # what failed can save nothing
            for channel in channels:
                channel.say("quit\n")
        for channel in channels:
            channel.end()
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(c.poll() is None for c in channels):
            time.sleep(0.1)
        for channel in channels:
            channel.kill()
            channel.drain()
    progress.look()
    if hang is not None:
        rank = f" rank {hang.rank}" if hang.rank is not None else ""
        outcome = Outcome(1, f"{hang.node}{rank}: {hang.why}", hang.node)
    else:
        outcome = _outcome(channels, console, progress, signals.count > heard)
    return outcome._replace(step=progress.step, silent_s=progress.silence(outcome.node))


def _watch(
    channels: Sequence[_Channel],
    signals: Signals,
    write: Callable[[str], None],
    progress: Progress,
    on_step: Callable[[int], None],
) -> Hang | None:
    """Return when all nodes have ended well, one badly or not at all, or the user wants no more."""
    first = heard = signals.count
    asked_at = 0.0
    while True:
        codes = [channel.poll() for channel in channels]
        if all(code is not None for code in codes):
            return None
        if any(code not in (None, 0) for code in codes):
            # nodes that stop for the same reason do so within a moment of each other
            for _ in range(50):
                if all(channel.poll() is not None for channel in channels):
                    return None
                time.sleep(0.1)
            return None
        if signals.count > heard:
            heard = signals.count
            if heard > first + 1:
                return None
            write("stopping after the step, with a checkpoint; once more to end at once")
            channels[0].say("stop\n")  # the ranks agree among themselves
        if time.monotonic() - asked_at > ALIVE_S:
            asked_at = time.monotonic()
            for channel in channels:
                channel.say("alive\n")
            hang = progress.look()
            on_step(progress.step)
            if hang is not None:
                return hang
        time.sleep(0.1)


def _with_stack(hang: Hang, channels: Sequence[_Channel], progress: Progress, folder: Path) -> Hang:
    """The hang with the stack of the rank that is to blame; all ranks are asked for theirs."""
    for channel in channels:
        channel.say("stacks\n")
    time.sleep(2.0)
    hang = progress.accuse(hang, folder)
    lines = read_stack(folder, hang.rank).splitlines() if hang.rank is not None else []
    if len(lines) > 1:
        hang = hang._replace(why=f"{hang.why}; it is in{lines[1].replace('File', '').rstrip()}")
    return hang


def _outcome(
    channels: Sequence[_Channel], console: Console, progress: Progress, asked: bool
) -> Outcome:
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
        return Outcome(1, f"{node}: a rank was ended by {name}{_last(progress)}", node)
    if lost and (said is None or said.is_consequence):
        text = said.lines[-1] if said and said.node in lost else "the connection is lost"
        why = f"{lost[0]}: {text} (ssh exits with {SSH_LOST}); try: ssh {lost[0]} true"
        return Outcome(1, why, lost[0])
    if said is not None:
        place = f"{said.node} rank {said.rank}" if said.rank else said.node
        ours = said.lines[0].startswith("mm: ")
        text = said.lines[0].removeprefix("mm: ") if ours else "\n".join(said.lines)
        # an exception is told in one line, too: the exit code says whose mistake it was
        is_input = ours and 2 in {*codes, *reported}
        return Outcome(2 if is_input else 1, f"{place}: {text}", said.node)
    if asked:
        return Outcome(1, "ended at once; the newest checkpoint is where the same command goes on")
    why = f"{guilty.node.name}: ended with exit code {guilty.poll()}, and said nothing"
    return Outcome(1, why, guilty.node.name)


def _last(progress: Progress) -> str:
    """What the ranks of the run last said they were doing, in one line."""
    if not progress.beats:
        return ""
    behind = min(progress.beats, key=lambda beat: (beat["step"], beat["since"]))
    return f" (rank {behind['rank']} was last in {behind['phase']} of step {behind['step']})"
