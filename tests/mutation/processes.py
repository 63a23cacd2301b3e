"""Worker processes of a mutation run, one a copy of the tree."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from warm import Session

# Slow to import and none of ours: loaded outside the measurement of lines.
SLOW = (
    "torch numpy pydantic deepspeed safetensors.torch sklearn.svm soundfile webdataset PIL.Image "
    "scipy.signal pytest rich typer tokenizers"
).split()


class Workers:
    """Processes that hold a warm session each and take jobs from one queue."""

    def __init__(
        self, trees: Sequence[Path], tests: Sequence[str], targets: Sequence[str], measures: bool
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.todo: Any = context.Queue()
        self.done: Any = context.Queue()
        given = (list(tests), list(targets), measures, self.todo, self.done)
        self.processes = [context.Process(target=_serve, args=(str(t), *given)) for t in trees]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
            process.join()

    def map(
        self, work: str, jobs: Sequence[tuple[Any, ...]], until: float | None = None
    ) -> Iterator[tuple[int, Any]]:
        """(number of the job, result) as they end; ``work`` names a method of a session.

        No job begins after ``until``, a time of `time.monotonic`: those have no result.
        """
        waiting, running = iter(enumerate(jobs)), 0
        while True:
            while running < len(self.processes) and (until is None or time.monotonic() < until):
                job = next(waiting, None)
                if job is None:
                    break
                self.todo.put((job[0], work, job[1]))
                running += 1
            if not running:
                return
            try:
                found = self.done.get(timeout=5)
            except queue.Empty:
                if not any(p.is_alive() for p in self.processes):
                    raise RuntimeError("all workers ended; see the messages above") from None
                continue
            running -= 1
            yield found


def _serve(
    tree: str, tests: list[str], targets: list[str], measures: bool, todo: Any, done: Any
) -> None:
    paths = (tree, f"{tree}/tests")
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "MM_SELF_CHECK": "0"}
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:0] = paths
    sys.dont_write_bytecode = True
    os.chdir(tree)
    for name in SLOW:
        importlib.import_module(name)
    session = Session(Path(tree).resolve(), targets, measures)

    def serve() -> None:
        while True:
            number, work, given = todo.get()
            done.put((number, getattr(session, work)(*given)))

    session.run(tests, serve)


def files_of(root: Path) -> list[str]:
    """All files that git knows or would take."""
    git = ["git", "ls-files", "-co", "--exclude-standard"]
    return subprocess.run(
        git, cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def copy_of_tree(root: Path, to: Path) -> Path:
    """A copy of `files_of` a tree, links as links."""
    shutil.rmtree(to, ignore_errors=True)
    for name in files_of(root):
        source = root / name
        if source.exists() or source.is_symlink():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name, follow_symlinks=False)
    return to
