"""Many damaged files through every door: `make fuzz`, resumable, memory and time capped.

    python tests/fuzz/run.py                    # 100,000 inputs, both cores
    python tests/fuzz/run.py --inputs 2000 --only index

Each batch is a fork of its own with at most MEMORY bytes. Results are lines of
build/fuzz/results.jsonl: batches that are there are not run again. A fault stands there with the
edits that make it, and its number: `DOORS[door].draw(Random(f"{door} {batch} {input}"))`. The table
at the end is what docs/reliability.md quotes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests"), str(ROOT)]
os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

from doors import DOORS  # noqa: E402
from guard import Desk, TooSlow, memory_folder, pass_through, warm  # noqa: E402

BATCH = 250
MEMORY = 8 << 30


def batch(name: str, number: int, seed: Path) -> dict[str, Any]:
    """Run one batch of a door. Its inputs are those of its name and number, whoever runs it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    door, found, faults = DOORS[name], Counter[str](), []
    slowest, begun = 0.0, time.monotonic()
    desk = Desk(seed, seed.parent)
    try:
        for i in range(BATCH):
            edits = door.draw(Random(f"{name} {number} {i}"))
            started = time.process_time()
            try:
                found[pass_through(door, desk, edits)] += 1
            except (Exception, TooSlow) as error:  # noqa: BLE001  counted, and told with its edits
                found["fault"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {str(error)[:200]} ({where.name})"
                faults.append({"error": text, "input": i, "edits": repr(edits)[:2000]})
            slowest = max(slowest, time.process_time() - started)
    finally:
        desk.close()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    row = {"door": name, "batch": number, "mib": rss, "slowest": round(slowest, 2)}
    row["seconds"] = round(time.monotonic() - begun, 1)
    return row | dict(found) | {"faults": faults}


def in_forks(jobs: Sequence[tuple[str, int, Path]], workers: int) -> Iterator[dict[str, Any]]:
    """Results of batches, each in a fork of this process, which has imported everything."""
    waiting, running = list(reversed(jobs)), dict[int, tuple[tuple[str, int, Path], Any]]()
    while waiting or running:
        while waiting and len(running) < workers:
            job, into = waiting.pop(), tempfile.TemporaryFile()
            child = os.fork()
            if child == 0:
                try:
                    try:
                        row = batch(*job)
                    except BaseException as error:  # noqa: BLE001
                        row = _failed(job, f"{type(error).__name__}: {error}")
                    into.write(json.dumps(row).encode())
                    into.flush()
                finally:
                    os._exit(0)
            running[child] = (job, into)
        child, status = os.wait()
        job, into = running.pop(child)
        with into:
            into.seek(0)
            text = into.read()
        yield json.loads(text) if text else _failed(job, f"killed (status {status})")


def _failed(job: tuple[str, int, Path], why: str) -> dict[str, Any]:
    """The row of a batch that ended badly, in memory or in C: a fault, too."""
    said = {"error": why, "input": -1, "edits": ""}
    return {"door": job[0], "batch": job[1], "fault": 1, "faults": [said]}


def run(inputs: int, only: str | None, workers: int, build: Path = ROOT / "build" / "fuzz") -> int:
    """Run what is missing of ``inputs``, print the table; returns the number of faults."""
    logging.disable(logging.CRITICAL)  # what is wrong with each file is no news here
    build.mkdir(parents=True, exist_ok=True)
    path = build / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(row["door"], row["batch"]) for row in rows}
    names = [name for name in DOORS if only in (None, name)]
    each = -(-inputs // BATCH // len(names)) or 1
    memory, git = memory_folder(), ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory(dir=memory) as folder, path.open("a") as file:
        for name in names:
            seed = Path(folder) / name
            seed.mkdir()
            DOORS[name].seed(seed)
            warm(DOORS[name], seed)
        every = [(name, n) for n in range(each) for name in names]
        jobs = [(name, n, Path(folder) / name) for name, n in every if (name, n) not in done]
        for i, row in enumerate(in_forks(jobs, workers), start=1):
            rows.append(row | {"commit": commit})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print(
                f"{i}/{len(jobs)} {row['door']} {row['batch']}: {len(row['faults'])} faults",
                flush=True,
            )
    print("\n| door | inputs | taken | refused | faults | slowest, s | MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    faults = 0
    for name in names:
        mine = [row for row in rows if row["door"] == name]
        count = {k: sum(row.get(k, 0) for row in mine) for k in ("taken", "refused", "fault")}
        most = max((row.get("mib", 0) for row in mine), default=0)
        print(f"| {name} | {sum(count.values()):,} |", end=" ")
        slow = max((row.get("slowest", 0) for row in mine), default=0)
        print(f"{count['taken']:,} | {count['refused']:,} | {count['fault']} |", end=" ")
        print(f"{slow:.1f} | {most:,} |")
        faults += count["fault"]
        for text in sorted({f["error"] for row in mine for f in row["faults"]}):
            print(f"  {name}: {text}")
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--only", help="one door")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="batches at a time")
    raise SystemExit(1 if run(**vars(parser.parse_args())) else 0)
