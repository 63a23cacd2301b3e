"""Mutation run: the one-line bugs that no test would notice.

    python tests/mutation/run.py            # all modules of TARGETS; hours, resumable
    python tests/mutation/run.py --sample 30 --seed HEAD
    python tests/mutation/run.py --only 'mm/trainer/*' --per-module 10

First every test file runs once under `coverage` (build/mutants/lines.json: which test files run
which lines, and how long each takes). Then every mutant is tested by the files that run its line,
quickest first, in a process forked from one that has torch and DeepSpeed loaded, in a copy of the
tree. Results are lines of build/mutants/results.jsonl: a run that is started again goes on. The
report is build/mutants/report.md; tests/mutation/accepted.tsv holds survivors that may live, with
the reason.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE)]

import processes  # noqa: E402
from mutate import Mutant, mutants_of  # noqa: E402

# Where a silent error costs a run.
TARGETS = (
    "mm/trainer/*.py",
    "mm/trainer/*/*.py",
    "mm/objectives/*.py",
    "mm/tasks/*.py",
    "mm/mask.py",
    "mm/layout.py",
    "mm/vocabulary.py",
    "mm/model/positions/*.py",
    "data/streams/*.py",
    "data/batching/*.py",
    "data/pack/*.py",
    "data/transforms/*.py",
    "tokenizers/quantizers/*.py",
)
LINKED = ("data", "tokenizers", "kernels", "launch", "configs")  # mm/<name> is a link to <name>
# Parts of the program and the test files that are named after them, for a quick run of one.
PARTS = {
    "data": ("data/*", "tests/data/*"),
    "trainer": ("mm/trainer/*", "tests/trainer/*"),
    "tokenizers": ("tokenizers/*", "tests/tokenizers/*"),
    "tasks": ("mm/tasks/*", "tests/tasks/*"),
}
SECONDS_A_MUTANT = 150.0  # of test files, once: what is quicker runs, the rest is left out


class Case(NamedTuple):
    """A mutant of a file, and the test files that run its line, quickest first."""

    file: str
    mutant: Mutant
    tests: list[str]

    @property
    def key(self) -> str:
        return f"{self.file}: {self.mutant.key}"


def target_files(only: str | None) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    chosen = [f for f in listed if any(fnmatch.fnmatch(f, t) for t in TARGETS)]
    return [f for f in chosen if only is None or fnmatch.fnmatch(f, only)]


def cases(files: Sequence[str], lines: dict[str, Any]) -> list[Case]:
    """Mutants of lines that some test file runs; others are told as not covered."""
    seconds = {t: found["seconds"] for t, found in lines.items() if found["passed"]}
    runs: dict[tuple[str, int], list[str]] = {}
    for test in seconds:
        for file, numbers in lines[test]["lines"].items():
            for number in numbers:
                runs.setdefault((file, number), []).append(test)
    out = []
    for file in files:
        for mutant in mutants_of((ROOT / file).read_text()):
            tests = sorted(runs.get((file, mutant.line), []), key=lambda t: seconds[t])
            total, kept = 0.0, []
            for test in tests:
                total += seconds[test]
                if not kept or total < SECONDS_A_MUTANT:
                    kept.append(test)
            out.append(Case(file, mutant, kept))
    return out


def chosen(found: list[Case], sample: int | None, seed: str, per_module: int | None) -> list[Case]:
    """A sample drawn by ``seed``, and at most ``per_module`` of every file."""
    found = [c for c in found if c.tests]
    draw = random.Random(hashlib.sha256(seed.encode()).hexdigest())
    if per_module is not None:
        by_file: dict[str, list[Case]] = {}
        for case in found:
            by_file.setdefault(case.file, []).append(case)
        found = [
            c for group in by_file.values() for c in draw.sample(group, min(per_module, len(group)))
        ]
    if sample is not None:
        found = draw.sample(found, min(sample, len(found)))
    return found


def accepted() -> dict[str, str]:
    """Survivors with the reason why no test need notice them, by key."""
    path = HERE / "accepted.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    return {key: reason for key, reason in rows}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results of earlier runs by key and hash of the file that they were for."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {f"{row['key']}@{row['hash']}": row for row in rows}


def hash_of(file: str) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:12]


def report(found: Sequence[Case], results: dict[str, dict[str, Any]], uncovered: int) -> str:
    """Markdown: a table by module, then every survivor."""
    known = accepted()
    by_file: dict[str, list[dict[str, Any]]] = {}
    for case in found:
        row = results.get(f"{case.key}@{hash_of(case.file)}")
        if row is not None:
            by_file.setdefault(case.file, []).append(row)
    total = [row for rows in by_file.values() for row in rows]
    caught = sum(row["caught"] for row in total)
    share = caught / max(1, len(total))
    out = [
        f"{caught} of {len(total)} mutants caught ({share:.1%}); "
        f"{uncovered} more are on lines that no test file runs in its own process",
        "",
        "| module | mutants | caught | accepted |",
        "|---|---|---|---|",
    ]
    survivors = []
    for file, rows in sorted(by_file.items()):
        alive = [row for row in rows if not row["caught"]]
        fine = [row for row in alive if row["key"] in known]
        out.append(f"| {file} | {len(rows)} | {len(rows) - len(alive)} | {len(fine)} |")
        survivors += [
            f"- line {row['line']} `{row['key']}`"
            + (f": {known[row['key']]}" if row["key"] in known else f" (ran {row['ran']})")
            for row in alive
        ]
    return "\n".join([*out, "", "Survivors:", "", *survivors]) + "\n"


def run(
    only: str | None = None,
    sample: int | None = None,
    seed: str = "0",
    per_module: int | None = None,
    workers: int | None = None,
    part: str | None = None,
    build: Path = ROOT / "build" / "mutants",
) -> list[dict[str, Any]]:
    """Measure lines where needed, test mutants, write the report; returns this run's rows."""
    build.mkdir(parents=True, exist_ok=True)
    if seed == "HEAD":
        git = ["git", "rev-parse", "HEAD"]
        seed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    n = workers or len(os.sched_getaffinity(0))
    trees = [copy_of_tree(build / f"tree{i}") for i in range(n)]
    tests = sorted(str(f.relative_to(ROOT)) for f in (ROOT / "tests").rglob("test_*.py"))
    if part is not None:
        only, of_tests = PARTS[part]
        tests = [t for t in tests if fnmatch.fnmatch(t, of_tests)]
    tests = [t for t in tests if not t.startswith("tests/mutation/")]
    lines = processes.lines_of_tests(ROOT, tests, trees, build / "lines.json", LINKED)
    files = target_files(only)
    every = cases(files, lines)
    wanted = chosen(every, sample, seed, per_module)
    path = build / "results.jsonl"
    done = read(path)
    todo = [c for c in wanted if f"{c.key}@{hash_of(c.file)}" not in done]
    print(f"{len(wanted)} mutants, {len(wanted) - len(todo)} tested before", flush=True)
    begun, caught = time.monotonic(), 0
    with path.open("a") as file:
        jobs = [(c.file, c.mutant.source, c.tests) for c in todo]
        for i, (number, found) in enumerate(processes.test_mutants(trees, jobs, lines), start=1):
            case = todo[number]
            row = {"key": case.key, "hash": hash_of(case.file), "line": case.mutant.line, **found}
            done[f"{row['key']}@{row['hash']}"] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            caught += row["caught"]
            left = (time.monotonic() - begun) / i * (len(todo) - i)
            word = "caught  " if row["caught"] else "SURVIVED"
            print(f"{i}/{len(todo)} {word} {row['key']}  ({left / 60:.0f} min left)", flush=True)
    uncovered = sum(not c.tests for c in every)
    text = report(wanted, done, uncovered)
    (build / "report.md").write_text(text)
    print(text.split("\nSurvivors")[0])
    print(f"survivors: {build / 'report.md'}")
    return [done[f"{c.key}@{hash_of(c.file)}"] for c in wanted]


def copy_of_tree(to: Path) -> Path:
    """A copy of all files that git knows or would take, links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    shutil.rmtree(to, ignore_errors=True)
    for name in listed:
        source = ROOT / name
        if source.exists() or source.is_symlink():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name, follow_symlinks=False)
    return to


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="files of this pattern, such as 'mm/trainer/*'")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by --seed")
    parser.add_argument("--seed", default="0", help="text, or HEAD for the commit's hash")
    parser.add_argument("--per-module", type=int, help="at most so many mutants of a file")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    parser.add_argument("--part", choices=PARTS, help="one part, by its own test files alone")
    run(**vars(parser.parse_args()))
