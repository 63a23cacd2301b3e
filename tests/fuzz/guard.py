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
WAIT = 300
touched: list[str] = []
_watch: list[str] = []  # the folder that a door may write into; empty: nobody watches
_links: list[str] = []  # links made while somebody watches: a path no longer says where it leads
# What a door may read besides: the program, its libraries, what the system tells of itself.
_PROGRAM = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])}
_READ = tuple(f"{p.rstrip('/')}/" for p in (*sorted(_PROGRAM), "/usr", "/proc", "/sys", "/dev"))
_RUN = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
        "pickle.find_class"}  # fmt: skip
_CHANGE = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
           "shutil.rmtree", "shutil.move"}  # fmt: skip

_TWO_NAMES = {"os.rename", "os.link", "os.symlink", "shutil.move"}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Note whatever runs a program, and files elsewhere that are read, written or changed.

    It sees what Python opens; a library in C or Rust that opens a path by itself is not seen.
    """
    if not _watch:
        return
    if event in _RUN:
        touched.append(f"{event} {args[0]!r}")
    elif event in ("open", "os.listdir", "os.scandir") or event in _CHANGE:
        if event in _CHANGE and isinstance(args[-1], int) and args[-1] > 2:
            return  # a name below a descriptor, which was opened before
        if event == "os.symlink":
            _links.append(str(args[1]))
        names = args[event == "os.symlink" : 2] if event in _TWO_NAMES else args[:1]
        writes = event in _CHANGE
        if event == "open":
            mode, flags = args[1], args[2]
            writes = bool(isinstance(mode, str) and set(mode) & set("wax+"))
            writes = writes or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        for name in names:
            if isinstance(name, (str, bytes, os.PathLike)):
                _note(event, os.fsdecode(name), writes)


def _note(event: str, name: str, writes: bool) -> None:
    if name.startswith(_watch[0]) and ".." not in name and not _links:
        return  # no seed has links, so the name says where it leads
    path = os.path.realpath(name)
    if path == os.devnull or f"{path}/".startswith(_watch[0]):
        return
    if writes or not f"{path}/".startswith(_READ):
        touched.append(f"{event} {path}")


sys.addaudithook(_audit)


class TooSlow(BaseException):
    """A door took longer than it may; no `except Exception` swallows it."""


def _alarm(number: int, _: Any) -> None:
    work = number == signal.SIGPROF
    raise TooSlow(f"over {SECONDS} s of work" if work else f"over {WAIT} s")


@contextmanager
def _limited() -> Any:
    """SECONDS of the processor's time, and of the clock's so many that a busy machine is no fault.

    Whoever waits or hangs is ended by the second.
    """
    timers = (
        (signal.ITIMER_PROF, signal.SIGPROF, SECONDS),
        (signal.ITIMER_REAL, signal.SIGALRM, WAIT),
    )
    before = [signal.signal(number, _alarm) for _, number, _ in timers]
    try:
        for timer, _, seconds in timers:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def memory_folder() -> str | None:
    """Where files are held in memory, if anywhere: nothing here need outlive the process."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Desk:
    """A folder with a copy of a seed, as new for every input.

    What an input changed is written again, all else stays; and the folder has another name each
    time, so that nothing kept by path is met again.
    """

    def __init__(self, seed: Path, inside: Path | None = None) -> None:
        made = tempfile.mkdtemp(prefix="mm-fuzz-", dir=inside or memory_folder())
        self.base = Path(os.path.realpath(made))
        self.folders = [p.relative_to(seed) for p in seed.rglob("*") if p.is_dir()]
        self.files = {p.relative_to(seed): p.read_bytes() for p in seed.rglob("*") if p.is_file()}
        assert not any(p.is_symlink() for p in seed.rglob("*"))
        self.number = 0
        self.folder = self.base / "0"
        self.folder.mkdir()
        self._marks: dict[str, tuple[int, int]] = {}
        self.renew()

    def renew(self) -> None:
        """Undo what was done to the copy, and call the folder by its next name."""
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        root = str(self.folder / "in")
        wanted = {os.path.join(root, p): p for p in (*self.folders, *self.files)}
        os.makedirs(root, exist_ok=True)
        todo = [root]
        while todo:
            with os.scandir(todo.pop()) as found:
                for entry in list(found):
                    path = wanted.get(entry.path)
                    folder = entry.is_dir(follow_symlinks=False)
                    if path in self.files and self._marks[str(path)] == _mark(entry):
                        del wanted[entry.path]
                    elif path is not None and path not in self.files and folder:
                        del wanted[entry.path]
                        todo.append(entry.path)
                    elif folder:
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)
        for path, name in sorted(wanted.items(), key=lambda pair: len(pair[1].parts)):
            if name not in self.files:
                os.mkdir(path)
                continue
            with open(path, "wb") as file:
                file.write(self.files[name])
            os.utime(path, (1, 1))  # whoever writes it later leaves another time
            self._marks[str(name)] = _mark(Path(path))
        (self.folder / "tmp").mkdir()
        self.number += 1
        self.folder = self.folder.rename(self.base / str(self.number))

    def close(self) -> None:
        shutil.rmtree(self.base, ignore_errors=True)


def _mark(entry: Any) -> tuple[int, int]:
    stat = entry.stat(follow_symlinks=False)
    return stat.st_ino, stat.st_mtime_ns


def warm(door: Door, seed: Path) -> None:
    """Read an undamaged copy, unwatched: imports may open and run what they like.

    Raises what the door raised: it must take its own seed.
    """
    desk = Desk(seed)
    try:
        door.enter(desk.folder / "in")
    finally:
        desk.close()


def pass_through(door: Door, desk: Desk, edits: Any) -> str:
    """Damage the copy on a desk and let the door read it: "taken" or "refused".

    Raises what the door raised, `TooSlow`, or AssertionError where it touched what lies elsewhere.
    """
    folder, before = desk.folder, tempfile.tempdir
    try:
        door.damage(folder / "in", edits)
        touched.clear()
        _links.clear()
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
        desk.renew()
