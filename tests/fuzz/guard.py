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
touched: list[str] = []
_watch: list[str] = []  # the folder that a door may write into; empty: nobody watches
# What a door may read besides: the program, its libraries, what the system tells of itself.
_PROGRAM = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])}
_READ = tuple(f"{p.rstrip('/')}/" for p in (*sorted(_PROGRAM), "/usr", "/proc", "/sys", "/dev"))
_RUN = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
        "pickle.find_class"}  # fmt: skip
_CHANGE = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
           "shutil.rmtree", "shutil.move"}  # fmt: skip


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Note whatever runs a program, and files elsewhere that are read, written or changed.

    It sees what Python opens; a library in C or Rust that opens a path by itself is not seen.
    """
    if not _watch:
        return
    if event in _RUN:
        touched.append(f"{event} {args[0]!r}")
    elif event in ("open", "os.listdir", "os.scandir") or event in _CHANGE:
        below = event in _CHANGE and isinstance(args[-1], int) and args[-1] > 2
        if below or not isinstance(args[0], (str, bytes, os.PathLike)):
            return  # a descriptor, or a name below one: it was opened before
        path = os.path.realpath(os.fsdecode(args[0]))
        if path == os.devnull or f"{path}/".startswith(_watch[0]):
            return
        writes = event in _CHANGE
        if event == "open":
            mode, flags = args[1], args[2]
            writes = bool(isinstance(mode, str) and set(mode) & set("wax+"))
            writes = writes or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes or not f"{path}/".startswith(_READ):
            touched.append(f"{event} {path}")


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

    Raises what the door raised, `TooSlow`, or AssertionError where it touched what lies elsewhere.
    """
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="mm-fuzz-")))
    before = tempfile.tempdir
    try:
        shutil.copytree(seed, folder / "in")
        (folder / "tmp").mkdir()
        door.damage(folder / "in", edits)
        touched.clear()
        tempfile.tempdir = str(folder / "tmp")
        _watch[:] = [f"{folder}/"]
        with _limited():
            try:
                door.enter(folder / "in")
                outcome = "taken"
            except REFUSALS as error:
                assert len(str(error)) < 4000, "a refusal is one line"
                outcome = "refused"
        assert not touched, f"touched what is not its own: {touched[:3]}"
        return outcome
    finally:
        _watch.clear()
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)
