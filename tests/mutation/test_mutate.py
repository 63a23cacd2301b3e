"""Mutants are one change of one statement, and of no words; the warm session tests them rightly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from mutate import keys_of, mutants_of  # noqa: E402
from processes import Workers  # noqa: E402
from table import accepted  # noqa: E402

SOURCE = '''
def scale(x, n, *, out=None):
    """Doubles, not words: 1 + 1."""
    if x < n and not out:
        x += 1
        log.info("%d", x - 1)
    if out:
        raise ValueError(f"{1 + 1}")
    with torch.no_grad():
        y = step(
            x.detach(), out, size=3, pin_memory=True
        )
    return max(x * 2, y[:n])
'''


def test_mutants_change_one_place_and_no_words() -> None:
    found = mutants_of(SOURCE)
    keys = [mutant.key for mutant in found]
    assert keys == [
        "scale: x < n and (not out) -> x < n or not out #0",
        "scale: x < n -> x <= n #0",
        "scale: not out -> out #0",
        "scale: x += 1 -> pass #0",
        "scale: 1 -> 2 #0",
        "scale: out -> not out #0",
        "scale: raise ValueError(f'{1 + 1}') -> pass #0",
        "scale: torch.no_grad() -> torch.enable_grad() #0",
        "scale: step(x.detach(), out, size=3, pin_memory=True) -> "
        "step(x.detach(), out, pin_memory=True) #0",
        "scale: x.detach() -> x #0",
        "scale: max(x * 2, y[:n]) -> min(x * 2, y[:n]) #0",
        "scale: x * 2 -> x / 2 #0",
        "scale: 2 -> 3 #0",
        "scale: n -> n - 1 #0",
    ]
    for mutant in found:
        pairs = zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True)
        changed = [i for i, (a, b) in enumerate(pairs, start=1) if a != b]
        assert mutant.line <= changed[0] <= changed[-1] <= mutant.last_line


PROGRAM = """
import functools

def double(x):
    return x * 2

def table():
    return {1: 1 + 1}

@functools.cache
def least(a, b):
    return min(a, b)

TABLE = table()
"""
TESTS = """
import subprocess, sys
import pytest
import program

@pytest.fixture(scope="module")
def four():
    return program.double(2)

def test_shared(four): assert four

def test_shared_too(four): assert four == 4

def test_table(): assert program.TABLE == {1: 2}

def test_least(): assert program.least(1, 2) == 1

def test_least_too(): assert program.least(1, 2)

def test_child():
    code = "import program; sys.exit(program.double(1) != 2)"
    subprocess.run([sys.executable, "-c", f"import sys; {code}"], check=True)
"""


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory):
    """One worker over a program of three functions, and the lines that its tests run."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "program.py").write_text(PROGRAM)
    (tree / "test_program.py").write_text(TESTS)
    with Workers([tree], ["test_program.py"], ["program.py"], measures=True) as pool:
        ((_, found),) = pool.map("measure", [("test_program.py",)])
        yield pool, {name.split("::")[1]: one for name, one in found.items()}


def test_lines_of_shared_fixtures_and_caches_count_for_every_test_that_uses_them(workers) -> None:
    _, found = workers
    lines = {name: one["lines"].get("program.py", []) for name, one in found.items()}
    assert lines["test_shared"] == lines["test_shared_too"] == [5]
    assert lines["test_least"] == lines["test_least_too"] == [12]
    assert lines["test_table"] == lines["test_child"] == []
    assert all(one["passed"] for one in found.values())


def test_lines_at_import_are_known(workers) -> None:
    pool, _ = workers
    ((_, lines),) = pool.map("lines_at_import", [()])
    assert 8 in lines["program.py"] and 5 not in lines["program.py"]


@pytest.mark.parametrize(
    ("key", "test", "fresh", "caught"),
    [
        ("double: x * 2 -> x / 2 #0", "test_shared", False, False),
        ("double: x * 2 -> x / 2 #0", "test_shared_too", False, True),
        ("double: x * 2 -> x / 2 #0", "test_child", False, True),
        ("least: min(a, b) -> max(a, b) #0", "test_least", False, True),
        ("least: min(a, b) -> max(a, b) #0", "test_least_too", False, False),
        ("table: 1 + 1 -> 1 - 1 #0", "test_table", True, True),
    ],
)
def test_mutants_are_caught_in_place_in_processes_and_at_import(
    workers, key: str, test: str, fresh: bool, caught: bool
) -> None:
    pool, _ = workers
    mutant = next(m for m in mutants_of(PROGRAM) if m.key == key)
    job = ("program.py", mutant.source, [(f"test_program.py::{test}", 1.0)], fresh)
    ((_, row),) = pool.map("mutate", [job])
    assert row["caught"] is caught


def test_accepted_survivors_are_mutants_of_the_program_as_it_is() -> None:
    """A line that has changed takes its reason with it."""
    known = accepted()
    files = {key.split(": ")[0] for key in known}
    keys = {f"{f}: {key}" for f in files for key in keys_of((ROOT / f).read_text())}
    assert set(known) <= keys and all(len(reason) > 10 for reason in known.values())
