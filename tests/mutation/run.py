"""Mutation run: the one-line bugs that no test would notice.

    python tests/mutation/run.py            # all modules of TARGETS; hours, goes on where it was
    python tests/mutation/run.py --per-module 8 --workers 1
    python tests/mutation/run.py --only 'mm/trainer/*' --sample 30 --seed HEAD

First every test file runs once under `coverage` (build/mutants/lines/: which test runs which
lines, and how long it takes; measured again where the test file or a module that it runs has
changed). Then every mutant is tested by the tests that run its statement, the quickest and those
that look at little besides its file first, for so many seconds, until one fails. Results are lines
of build/mutants/results.jsonl; a survivor is tested again once its tests or --seconds have changed.
The report is build/mutants/report.md; accepted.tsv beside this file holds survivors that may live,
with the reason.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE)]

from mutate import Mutant, digest, mutants_of  # noqa: E402
from processes import Workers, copy_of_tree, files_of  # noqa: E402
from table import report  # noqa: E402

# Where a silent error costs a run.
TARGETS = (
    "mm/trainer/*.py",
    "mm/objectives/*.py",
    "mm/tasks/*.py",
    "mm/mask.py",
    "mm/layout.py",
    "mm/shard.py",
    "mm/vocabulary.py",
    "mm/model/positions/*.py",
    "data/streams/*.py",
    "data/batching/*.py",
    "data/pack/*.py",
    "data/transforms/*.py",
    "tokenizers/quantizers/*.py",
)
# Test files that run in the process that collects them and matter to the targets. Commands,
# kernels, mixers and pages have none of the targets' lines to themselves.
TESTS = (
    "tests/trainer/*",
    "tests/data/*",
    "tests/tasks/*",
    "tests/tokenizers/*",
    "tests/decoders/*",
    "tests/surgery/*",
    "tests/model/test_*",
    "tests/model/mixers/test_attention_settings.py",
    "tests/model/mixers/test_mixer_attention_positions.py",
    "tests/own_data/*",
    "tests/sequence/test_sequence_batches.py",
    "tests/test_config.py",
    "tests/test_vocabulary.py",
    "tests/test_registry.py",
    "tests/test_hashes.py",
    "tests/test_reading.py",
)
SECONDS_A_MUTANT = 5.0  # of tests, as measured; what comes after is left out


class Case(NamedTuple):
    """A mutant of a file, and the tests that run its statement, in the order to run them."""

    file: str
    mutant: Mutant
    tests: list[tuple[str, float]]
    at_import: bool

    @property
    def key(self) -> str:
        return f"{self.file}: {self.mutant.key}"

    @property
    def id(self) -> str:
        """Under which its result is kept: it holds until the function changes."""
        return f"{self.key}@{self.mutant.within}"


def files_like(patterns: Sequence[str]) -> list[str]:
    return sorted(f for f in files_of(ROOT) if any(fnmatch.fnmatch(f, p) for p in patterns))


def hash_of(file: str) -> str:
    return digest((ROOT / file).read_bytes())


def lines_of_tests(
    workers: Workers, tests: Sequence[str], build: Path, until: float | None
) -> dict[str, dict[str, Any]]:
    """Lines and seconds of every test, by test file, measured where they are not known."""
    known = {t: _known(build / "lines" / f"{t.replace('/', '.')}.json", t) for t in tests}
    todo = [t for t in tests if known[t] is None]
    (build / "lines").mkdir(parents=True, exist_ok=True)
    measured = workers.map("measure", [(t,) for t in todo], until)
    for i, (number, found) in enumerate(measured, start=1):
        test = todo[number]
        ran = sorted({file for one in found.values() for file in one["lines"]})
        known[test] = {"hashes": {f: hash_of(f) for f in [test, *ran]}, "tests": found}
        path = build / "lines" / f"{test.replace('/', '.')}.json"
        path.write_text(json.dumps(known[test]))
        seconds = sum(one["seconds"] for one in found.values())
        failed = [name for name, one in found.items() if not one["passed"]]
        say = f"; left out, they fail here: {failed}" if failed else ""
        print(f"lines {i}/{len(todo)} {test} {seconds:.0f} s, {len(found)} tests{say}", flush=True)
    left = [t for t, found in known.items() if found is None]
    if left:
        print(f"not run, the time was over: {len(left)} test files: {' '.join(left)}", flush=True)
    return {t: found for t, found in known.items() if found is not None}


def _known(path: Path, test: str) -> dict[str, Any] | None:
    found = json.loads(path.read_text()) if path.is_file() else None
    if found is None or test not in found["hashes"]:
        return None
    same = all((ROOT / f).is_file() and hash_of(f) == h for f, h in found["hashes"].items())
    return found if same else None


def lines_at_import(workers: Workers, targets: Sequence[str], build: Path) -> dict[str, set[int]]:
    """Lines that run when modules are imported: a warm process cannot change what they made."""
    path, state = build / "import.json", digest(*(hash_of(t) for t in targets))
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("state") != state:
        ((_, lines),) = workers.map("lines_at_import", [()])
        found = {"state": state, "lines": lines}
        path.write_text(json.dumps(found))
    return {file: set(numbers) for file, numbers in found["lines"].items()}


def cases(
    targets: Sequence[str],
    lines: dict[str, dict[str, Any]],
    at_import: dict[str, set[int]],
    seconds: float,
) -> list[Case]:
    """Mutants with the tests that run their statements; none of a test that fails anyway."""
    runs: dict[tuple[str, int], set[str]] = {}
    tests = {n: one for f in lines.values() for n, one in f["tests"].items() if one["passed"]}
    for name, one in tests.items():
        one["n_lines"] = sum(map(len, one["lines"].values()))
        for file, numbers in one["lines"].items():
            for number in numbers:
                runs.setdefault((file, number), set()).add(name)
    out = []
    for file in targets:
        for mutant in mutants_of((ROOT / file).read_text()):
            span = range(mutant.line, mutant.last_line + 1)
            names = set().union(*(runs.get((file, n), ()) for n in span))
            imported = any(n in at_import.get(file, ()) for n in span)
            out.append(Case(file, mutant, _tests_first(file, names, tests, seconds), imported))
    return out


def _tests_first(
    file: str, names: set[str], tests: dict[str, Any], seconds: float
) -> list[tuple[str, float]]:
    """Tests in the order to run, with their seconds, up to the limit.

    Quick ones that look at little besides come first, and those that run more of the mutant's own
    ``file``; each further test of one test file comes later, as they are alike. What a test shares
    with others of its test file counts once.
    """
    cost = {n: tests[n]["seconds"] + tests[n]["shared"] for n in names}
    own = {n: len(tests[n]["lines"].get(file, ())) for n in names}
    most = max(own.values(), default=1)
    worth = {
        n: (cost[n] + 0.02) * tests[n]["n_lines"] ** 0.5 * (most / max(1, own[n])) ** 2
        for n in names
    }
    before: dict[str, int] = {}
    for name in sorted(names, key=lambda n: (worth[n], n)):
        test_file = name.split("::")[0]
        before[test_file] = before.get(test_file, 0) + 1
        worth[name] *= before[test_file]
    total, kept, paid = 0.0, [], dict[str, float]()
    for name in sorted(names, key=lambda n: (worth[n], n)):
        test_file, shared = name.split("::")[0], tests[name]["shared"]
        more = tests[name]["seconds"] + max(0.0, shared - paid.get(test_file, 0.0))
        if kept and total + more > seconds:
            continue
        total += more
        paid[test_file] = max(paid.get(test_file, 0.0), shared)
        kept.append((name, cost[name]))
    return kept


def chosen(found: list[Case], sample: int | None, seed: str, per_module: int | None) -> list[Case]:
    """Covered mutants in an order drawn by ``seed``, at most ``per_module`` of every file.

    The order is by hashes of their names: more tests or mutants change no other one's place.
    """
    ranked = sorted((c for c in found if c.tests), key=lambda c: digest(seed, c.key))
    taken: dict[str, int] = {}
    kept = []
    for case in ranked:
        taken[case.file] = taken.get(case.file, 0) + 1
        if per_module is None or taken[case.file] <= per_module:
            kept.append(case)
    return kept[:sample]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results of earlier runs by `Case.id`."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {f"{row['key']}@{row['within']}": row for row in rows}


def head() -> str:
    git = ["git", "rev-parse", "HEAD"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def run(
    only: str | None = None,
    skip: Sequence[str] = (),
    sample: int | None = None,
    seed: str = "0",
    per_module: int | None = None,
    workers: int | None = None,
    tests: Sequence[str] = TESTS,
    seconds: float = SECONDS_A_MUTANT,
    survivors: bool = False,
    minutes: float | None = None,
    build: Path = ROOT / "build" / "mutants",
) -> list[dict[str, Any]]:
    """Measure lines where needed, test mutants, write the report; returns this run's rows.

    Of ``minutes`` a half may go to lines; mutants that no time was left for have no row.
    """
    begun = time.monotonic()
    ends = (None, None) if minutes is None else (begun + 30 * minutes, begun + 60 * minutes)
    build.mkdir(parents=True, exist_ok=True)
    trees = [
        copy_of_tree(ROOT, build / f"tree{i}")
        for i in range(workers or len(os.sched_getaffinity(0)))
    ]
    targets = files_like(TARGETS)
    files = [f for f in files_like(tests) if Path(f).name.startswith("test_")]
    wanted_files = [
        f
        for f in targets
        if (only is None or fnmatch.fnmatch(f, only))
        and not any(fnmatch.fnmatch(f, s) for s in skip)
    ]
    stamps = {f: hash_of(f) for f in files}
    with Workers(trees, files, targets, measures=True) as pool:
        at_import = lines_at_import(pool, targets, build)
        lines = lines_of_tests(pool, files, build, ends[0])
        every = cases(wanted_files, lines, at_import, seconds)
        wanted = chosen(every, sample, head() if seed == "HEAD" else seed, per_module)
        path = build / "results.jsonl"
        done = read(path)

        def settled(case: Case) -> bool:
            row = done.get(case.id)
            return row is not None and (row["caught"] or row["tests"] == state(case))

        def state(case: Case) -> str:
            return digest(
                *(f"{name} {stamps[name.split('::')[0]]}" for name, _ in sorted(case.tests))
            )

        todo = [c for c in wanted if not settled(c)]
        tested = lambda c: c.id in done
        todo.sort(key=tested)  # survivors last
        if survivors:
            todo = [c for c in todo if tested(c)]
        print(f"{len(wanted)} mutants, {len(wanted) - len(todo)} tested before", flush=True)
        jobs = [(c.file, c.mutant.source, c.tests, c.at_import) for c in todo]
        begun, i = time.monotonic(), 0
        for i, (number, found) in enumerate(pool.map("mutate", jobs, ends[1]), start=1):
            case = todo[number]
            row = {"key": case.key, "within": case.mutant.within, "line": case.mutant.line}
            row |= {"operator": case.mutant.operator, "tests": state(case), **found}
            done[case.id] = row
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            left = (time.monotonic() - begun) / i * (len(todo) - i)
            word = "caught  " if row["caught"] else "SURVIVED"
            print(f"{i}/{len(todo)} {word} {row['key']}  ({left / 60:.0f} min left)", flush=True)
        if i < len(todo):
            print(f"not run, the time was over: {len(todo) - i} mutants", flush=True)
    known = {c.id for c in every}
    text = report([row for k, row in done.items() if k in known and row["ran"]], every)
    (build / "report.md").write_text(text)
    print(text.split("\nSurvivors")[0])
    print(f"survivors: {build / 'report.md'}")
    return [row for c in wanted if (row := done.get(c.id)) is not None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One-line bugs that no test would notice.")
    parser.add_argument("--only", help="modules of this pattern, such as 'mm/trainer/*'")
    parser.add_argument("--skip", nargs="*", default=(), help="no modules of these patterns")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by --seed")
    parser.add_argument("--seed", default="0", help="text, or HEAD for the commit's hash")
    parser.add_argument("--per-module", type=int, help="at most so many mutants of a file")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="test files of these patterns")
    parser.add_argument("--survivors", action="store_true", help="those that lived, again")
    parser.add_argument("--minutes", type=float, help="end after about so many")
    parser.add_argument("--seconds", type=float, default=SECONDS_A_MUTANT, help="a mutant")
    run(**vars(parser.parse_args()))
