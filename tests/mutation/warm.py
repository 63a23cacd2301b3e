"""A pytest session that collects once and then runs tests in forks, with or without a mutant.

The parent imports the program and the test files and never runs a test. A fork gets the mutant's
code put into the functions that are there already, so a mutant costs a fork and its tests. What
processes of their own import is the mutated file on disk.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

MEMORY_BYTES = 6 << 30  # that a mutant's tests may take above the parent
FLAGS = (
    "-q -s -p no:cacheprovider -p no:xdist -o timeout=0 -p no:hypothesispytest --no-header --tb=no"
).split()


def limit_s(seconds: float) -> float:
    """CPU time that a test may take which took ``seconds`` without a mutant."""
    return 4 * seconds + 5


class Session:
    """The plugin: serves jobs in place of pytest's own loop over the tests."""

    def __init__(self, tree: Path, targets: Sequence[str], measures: bool) -> None:
        self.tree = tree
        self.files = {str((tree / name).resolve()): name for name in targets}
        self.serve: Callable[[], None] = lambda: None
        self.items: dict[str, pytest.Item] = {}
        self.functions: dict[str, list[FunctionType]] = {}
        self.caches: list[Any] = []
        self.good: set[str] = set()  # tests that pass alone, without a mutant
        self.flaky: set[str] = set()
        self.failed: str | None = None
        self.watch: Any = self._coverage() if measures else None
        self.at_import: dict[str, list[int]] = {}
        self.context: str | None = None  # the test or shared fixture whose lines are recorded
        self.seconds: dict[str, float] = {}  # of both

    def lines_at_import(self) -> dict[str, list[int]]:
        """Lines of the target files that ran while the test files were collected."""
        return self.at_import

    def run(self, tests: Sequence[str], serve: Callable[[], None]) -> None:
        self.serve = serve
        if self.watch is not None:
            self.watch.start()
        flags = [*FLAGS, "--basetemp", str(self.tree / ".tmp")]
        status = pytest.main([*flags, *tests], plugins=[self])
        if status != 0:
            raise RuntimeError(f"the test files could not be collected (status {status})")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            return True
        if self.watch is not None:  # lines that run when modules are imported
            self.watch.stop()
            self.at_import = {
                name: sorted(self.watch.get_data().lines(path) or [])
                for path, name in self.files.items()
            }
        self.items = {item.nodeid: item for item in session.items}
        # After an import a fork cannot change what it has made, so functions are changed in place.
        gc.collect()
        for found in gc.get_objects():
            if type(found) is FunctionType:
                name = self._target(found.__code__.co_filename)
                if name is not None:
                    self.functions.setdefault(name, []).append(found)
            elif isinstance(found, functools._lru_cache_wrapper):
                code = getattr(found.__wrapped__, "__code__", None)
                if code is not None and code.co_filename.startswith(str(self.tree)):
                    self.caches.append(found)
        gc.freeze()
        self.serve()
        return True

    @functools.cache  # noqa: B019
    def _target(self, path: str) -> str | None:
        return self.files.get(os.path.realpath(path))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        """Lines of a fixture that several tests share count for all of them."""
        before, begun = self.context, time.monotonic()
        if before is None or fixturedef.scope == "function":
            yield
            return
        name = _fixture_name(fixturedef, getattr(request, "param_index", 0))
        self._switch(name)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
        self._switch(before)

    def _switch(self, context: str) -> None:
        self.context = context
        self.watch.switch_context(context)

    def _coverage(self) -> Any:
        import coverage

        return coverage.Coverage(
            data_file=None, include=list(self.files), config_file=False, messages=False
        )

    def measure(self, test_file: str) -> dict[str, Any]:
        """Run one test file under coverage: lines and seconds of every test of it.

        Lines are those of the target files; seconds of a test include the fixtures it shares.
        """
        items = [item for item in self.items.values() if item.nodeid.split("::")[0] == test_file]
        into = self.tree / "lines.part"
        into.unlink(missing_ok=True)

        def call() -> int:
            self.watch = self._coverage()
            self.context, self.seconds = "", {}
            passed: dict[str, bool] = {}
            self.watch.start()
            for item, following in zip(items, [*items[1:], None], strict=True):
                for cache in self.caches:  # else only the first test runs what they hold
                    cache.cache_clear()
                self.failed, begun = None, time.monotonic()
                shared = sum(s for name, s in self.seconds.items() if "::" not in name)
                self._switch(item.nodeid)
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
                shared -= sum(s for name, s in self.seconds.items() if "::" not in name)
                self.seconds[item.nodeid] = time.monotonic() - begun + shared
                passed[item.nodeid] = self.failed is None
            self.watch.stop()
            into.write_text(json.dumps(self._by_test(items, passed)))
            return 0

        _forked(1200, call)
        if into.is_file():
            return json.loads(into.read_text())
        failed = {"seconds": 0, "shared": 0, "passed": False, "lines": {}}
        return {item.nodeid: failed for item in items}

    def _by_test(self, items: list[Any], passed: dict[str, bool]) -> dict[str, Any]:
        ran: dict[str, dict[str, set[int]]] = {}
        data = self.watch.get_data()
        for path, name in self.files.items():
            for line, contexts in data.contexts_by_lineno(path).items():
                for context in contexts:
                    ran.setdefault(context, {}).setdefault(name, set()).add(line)
        found = {}
        for item in items:
            names = {item.nodeid}
            indices = getattr(getattr(item, "callspec", None), "indices", {})
            for defs in item._fixtureinfo.name2fixturedefs.values():
                names |= {_fixture_name(d, indices.get(d.argname, 0)) for d in defs}
            lines: dict[str, set[int]] = {}
            for name in names:
                for file, numbers in ran.get(name, {}).items():
                    lines.setdefault(file, set()).update(numbers)
            found[item.nodeid] = {
                "seconds": round(self.seconds.get(item.nodeid, 0.0), 3),
                "shared": round(sum(self.seconds.get(n, 0.0) for n in names - {item.nodeid}), 3),
                "passed": passed.get(item.nodeid, False),
                "lines": {file: sorted(numbers) for file, numbers in lines.items()},
            }
        return found

    def mutate(
        self, file: str, source: str, tests: list[tuple[str, float]], fresh: bool
    ) -> dict[str, Any]:
        """Test one mutant with tests (name, seconds): caught by the first that fails.

        A test that ends the process or takes too long has failed as well. A test that caught
        something must pass without a mutant, or it counts no more. ``fresh`` runs the tests in a
        new process, for functions that run when modules are imported.
        """
        begun = time.monotonic()
        path = self.tree / file
        original = path.read_bytes()
        while True:
            tests = [t for t in tests if t[0] not in self.flaky and t[0] in self.items]
            found = None if fresh else self._codes(file, original.decode(), source)
            path.write_text(source)
            try:
                by, status = self._fresh(tests) if found is None else self._run(tests, found)
            finally:
                path.write_bytes(original)
            if by is not None and by not in self.good:
                own = [t for t in tests if t[0] == by]
                alone = self._fresh(own) if found is None else self._run(own, [])
                if alone[0] is not None:
                    self.flaky.add(by)
                    continue
                self.good.add(by)
            row = {"caught": by is not None, "by": by, "status": status, "ran": len(tests)}
            return row | {"seconds": round(time.monotonic() - begun, 2)}

    def _codes(
        self, file: str, original: str, mutated: str
    ) -> list[tuple[FunctionType, CodeType]] | None:
        """Functions of a file and their mutated code; None where one cannot take it."""
        old, new = _codes_of(original), _codes_of(mutated)
        changes = []
        for function in self.functions.get(file, []):
            code = function.__code__
            places = [k for k in old if k[:2] == (code.co_qualname, code.co_firstlineno)]
            key = next((k for k in places if old[k] == code), places[0] if places else None)
            if key is None or old[key] == new.get(key):
                continue
            if key not in new or new[key].co_freevars != code.co_freevars:
                return None
            changes.append((function, new[key]))
        return changes

    def _run(
        self, tests: list[tuple[str, float]], changes: list[tuple[FunctionType, CodeType]]
    ) -> tuple[str | None, int]:
        """(test that failed, exit status) of tests in one fork; (None, 0) where all passed."""
        running = self.tree / ".running"
        running.write_text("")

        def call() -> int:
            for function, code in changes:
                function.__code__ = code
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, hard))
            items = [self.items[name] for name, _ in tests]
            self.failed = None
            for item, following, (name, seconds) in zip(
                items, [*items[1:], None], tests, strict=True
            ):
                running.write_text(name)
                hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
                most = int(time.process_time() + limit_s(seconds)) + 1
                resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
                if self.failed is not None:
                    return 1
            return 0

        status = _forked(60 + sum(20 * seconds + 5 for _, seconds in tests), call)
        return (None, 0) if status == 0 else (running.read_text() or "no test", status)

    def _fresh(self, tests: list[tuple[str, float]]) -> tuple[str | None, int]:
        """The same in a process that imports everything anew."""
        names = [name for name, _ in tests]
        if not names:
            return None, 0
        command = [sys.executable, "-m", "pytest", *FLAGS, "-x"]
        most = 300 + sum(20 * seconds for _, seconds in tests)
        try:
            status = subprocess.run(
                [*command, *names], cwd=self.tree, capture_output=True, timeout=most
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
        return (None, 0) if status in (0, 5) else (names[-1], status)


def _fixture_name(fixturedef: Any, index: int) -> str:
    if fixturedef.scope == "function":
        return ""
    return f"fixture {fixturedef.baseid} {fixturedef.argname} {index}".replace("::", " ")


def _codes_of(source: str) -> dict[tuple[str, int, int], CodeType]:
    """All code of a file by qualified name, first line and number among those."""
    found: dict[tuple[str, int, int], CodeType] = {}

    def walk(code: CodeType) -> None:
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                n = 0
                while (key := (inner.co_qualname, inner.co_firstlineno, n)) in found:
                    n += 1
                found[key] = inner
                walk(inner)

    walk(compile(source, "mutant", "exec", dont_inherit=True))
    return found


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
    waited, before = 0.0, time.monotonic()
    while waited < limit_s:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            _kill_group(child)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
        now = time.monotonic()
        waited, before = waited + min(0.5, now - before), now  # a run may be stopped and go on
    _kill_group(child)
    os.waitpid(child, 0)
    return -1


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
