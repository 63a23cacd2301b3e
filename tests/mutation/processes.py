"""Processes of a mutation run: test files forked from one that has the slow imports behind it."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Slow to import and none of ours: loaded once, before the forks.
SLOW = (
    "torch numpy pydantic deepspeed safetensors.torch sklearn.svm soundfile webdataset PIL.Image "
    "scipy.signal pytest rich typer tokenizers"
).split()
FLAGS = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=no")
SPARE_S = 20.0  # over four times what a test file took without a mutant


def lines_of_tests(
    root: Path, tests: Sequence[str], trees: Sequence[Path], path: Path, linked: Sequence[str]
) -> dict[str, Any]:
    """Lines of the program that each test file runs, its seconds, and whether it passes.

    Kept in ``path`` by the time a test file was last changed; measured again where that moved.
    """
    have: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    stamp = {t: (root / t).stat().st_mtime_ns for t in tests}
    todo = [t for t in tests if have.get(t, {}).get("stamp") != stamp[t]]
    jobs = [(t, tuple(linked)) for t in todo]
    for i, (number, found) in enumerate(_pool(trees, _measure, jobs), start=1):
        have[todo[number]] = found | {"stamp": stamp[todo[number]]}
        print(f"lines {i}/{len(todo)} {todo[number]} {found['seconds']:.0f} s", flush=True)
        path.write_text(json.dumps(have))
    return {t: have[t] for t in tests}


def test_mutants(
    trees: Sequence[Path], jobs: Sequence[tuple[str, str, list[str]]], lines: dict[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Test mutants (file, source, test files); yields their numbers and what was found."""
    limits = {t: 4 * found["seconds"] + SPARE_S for t, found in lines.items()}
    full = [(file, text, tests, [limits[t] for t in tests]) for file, text, tests in jobs]
    yield from _pool(trees, _mutate, full)


def _pool(trees: Sequence[Path], work: Any, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Run jobs, one process a tree; yields (number of the job, result) as they end."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    todo: Any = context.Queue()
    done: Any = context.Queue()
    for numbered in enumerate(jobs):
        todo.put(numbered)
    workers = [context.Process(target=_serve, args=(str(t), work, todo, done)) for t in trees]
    for worker in workers:
        todo.put(None)
        worker.start()
    try:
        for _ in jobs:
            while True:
                try:
                    yield done.get(timeout=5)
                    break
                except queue.Empty:
                    if not any(w.is_alive() for w in workers):
                        raise RuntimeError("all workers ended; see the messages above") from None
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _serve(tree: str, work: Any, todo: Any, done: Any) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"PYTHONPATH": os.pathsep.join((tree, f"{tree}/tests")), "MM_SELF_CHECK": "0"}
    sys.path[:0] = [tree, f"{tree}/tests"]
    sys.dont_write_bytecode = True
    os.chdir(tree)
    for name in SLOW:
        importlib.import_module(name)
    while (job := todo.get()) is not None:
        number, given = job
        done.put((number, work(Path(tree), *given)))


def _forked(limit_s: float, call: Any) -> int:
    """Exit status of ``call`` in a forked process group; -1 when it took longer than the limit."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        quiet = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(quiet, fd)
        status = 70
        try:
            status = int(call())
        finally:
            os._exit(status)
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            _kill_group(child)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    _kill_group(child)
    os.waitpid(child, 0)
    return -1


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _pytest(test: str) -> int:
    import pytest

    return int(pytest.main([*FLAGS, test]))


def _measure(tree: Path, test: str, linked: tuple[str, ...]) -> dict[str, Any]:
    """Run one test file under coverage."""
    into = tree / "lines.part"
    into.unlink(missing_ok=True)

    def call() -> int:
        import coverage

        watch = coverage.Coverage(data_file=None, source=[str(tree)], omit=["*/tests/*"])
        begun = time.monotonic()
        watch.start()
        status = _pytest(test)
        watch.stop()
        seconds, data, lines = time.monotonic() - begun, watch.get_data(), {}
        for file in data.measured_files():
            name = os.path.relpath(file, tree)
            head, _, rest = name.partition("/")
            if head == "mm" and rest.split("/")[0] in linked:
                name = rest
            lines[name] = sorted(set(data.lines(file) or []) | set(lines.get(name, [])))
        found = {"seconds": seconds, "passed": status == 0, "lines": lines}
        into.write_text(json.dumps(found))
        return status

    _forked(900, call)
    if not into.is_file():
        return {"seconds": 900.0, "passed": False, "lines": {}}
    return json.loads(into.read_text())


def _mutate(
    tree: Path, file: str, source: str, tests: list[str], limits: list[float]
) -> dict[str, Any]:
    """Test one mutant: caught by the first test file that fails, ends badly or takes too long."""
    path = tree / file
    original = path.read_bytes()
    ran = 0
    try:
        path.write_text(source)
        for test, limit in zip(tests, limits, strict=True):
            status = _forked(limit, lambda test=test: _pytest(test))
            ran += 1
            if status not in (0, 5):  # 5: nothing in the file is selected
                return {"caught": True, "by": test, "status": status, "ran": ran}
    finally:
        path.write_bytes(original)
    return {"caught": False, "by": None, "status": 0, "ran": ran}
