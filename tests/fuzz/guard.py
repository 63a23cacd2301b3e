"""One damaged input through a door: what came out, in what time, and what else was touched."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from doors import REFUSALS, Door

SECONDS = 10
opened: list[str] = []
_watch: list[Path] = []  # folders that a door may write into; empty: nobody watches


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Note files that are opened for writing elsewhere, and whatever runs a program."""
    if not _watch:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class"):
        opened.append(f"{event} {args[0]!r}")
    elif event == "open" and isinstance(args[0], (str, bytes)):
        mode, flags = args[1], args[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (
            os.O_WRONLY | os.O_RDWR
        ):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not any(path.startswith(str(root)) for root in _watch) and path != os.devnull:
                opened.append(f"write {path}")


sys.addaudithook(_audit)


class TooSlow(BaseException):
    """A door took longer than it may; no `except Exception` swallows it."""


def _alarm(*_: Any) -> None:
    raise TooSlow(f"over {SECONDS} s")


@contextmanager
def _limited() -> Any:
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def warm(door: Door, seed: Path) -> None:
    """Read an undamaged copy, unwatched: imports may open and run what they like.

    Raises what the door raised: it must take its own seed.
    """
    with tempfile.TemporaryDirectory(prefix="mm-fuzz-") as folder:
        shutil.copytree(seed, Path(folder) / "in")
        door.enter(Path(folder) / "in")


def pass_through(door: Door, seed: Path, edits: Any) -> str:
    """Damage a copy of ``seed`` and let the door read it: "taken" or "refused".

    Raises what the door raised, `TooSlow`, or AssertionError where it wrote elsewhere.
    """
    folder = Path(tempfile.mkdtemp(prefix="mm-fuzz-"))
    try:
        shutil.copytree(seed, folder / "in")
        door.damage(folder / "in", edits)
        opened.clear()
        _watch[:] = [folder, Path(tempfile.gettempdir()), Path("/dev/shm"), Path("/proc/self")]
        with _limited():
            try:
                door.enter(folder / "in")
                outcome = "taken"
            except REFUSALS as error:
                assert len(str(error)) < 4000, "a refusal is one line"
                outcome = "refused"
        assert not opened, f"touched what is not its own: {opened}"
        return outcome
    finally:
        _watch.clear()
        shutil.rmtree(folder, ignore_errors=True)
