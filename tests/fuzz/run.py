"""Many damaged files through every door: `make fuzz`, resumable, memory and time capped.

    python tests/fuzz/run.py                    # 100,000 inputs, both cores
    python tests/fuzz/run.py --inputs 2000 --only index

Each batch is a process of its own with at most MEMORY bytes. Results are lines of
build/fuzz/results.jsonl: batches that are there are not run again. A fault stands there with the
edits that make it; the table at the end is what docs/reliability.md quotes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests"), str(ROOT)]

BATCH = 250
MEMORY = 8 << 30


def batch(name: str, number: int) -> dict[str, Any]:
    """Run one batch of a door; in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from doors import DOORS
    from guard import TooSlow, pass_through, warm
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    door, found, faults = DOORS[name], Counter[str](), []
    slowest = [0.0]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mm-fuzz-") as folder:
        seed = Path(folder) / "seed"
        seed.mkdir()
        door.seed(seed)
        warm(door, seed)

        @settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @seeded(number)
        @given(edits=door.strategy)
        def check(edits: Any) -> None:
            started = time.monotonic()
            try:
                found[pass_through(door, seed, edits)] += 1
            except (Exception, TooSlow) as error:  # noqa: BLE001  counted, and told with its edits
                found["fault"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {str(error)[:200]} ({where.name})"
                faults.append({"error": text, "edits": repr(edits)[:2000]})
            slowest[0] = max(slowest[0], time.monotonic() - started)

        check()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    seconds = time.monotonic() - begun
    row = {"door": name, "batch": number, "mib": rss, "seconds": round(seconds, 1)}
    row["slowest"] = round(slowest[0], 2)
    return row | dict(found) | {"faults": faults}


def _safe(job: tuple[str, int]) -> dict[str, Any]:
    try:
        return batch(*job)
    except BaseException as error:  # noqa: BLE001  a batch that ends badly is a fault, too
        said = {"error": f"{type(error).__name__}: {error}", "edits": ""}
        return {"door": job[0], "batch": job[1], "fault": 1, "faults": [said]}


def run(inputs: int, only: str | None, workers: int, build: Path = ROOT / "build" / "fuzz") -> int:
    """Run what is missing of ``inputs``, print the table; returns the number of faults."""
    from doors import DOORS

    build.mkdir(parents=True, exist_ok=True)
    path = build / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(row["door"], row["batch"]) for row in rows}
    names = [name for name in DOORS if only in (None, name)]
    each = -(-inputs // BATCH // len(names)) or 1
    jobs = [(name, n) for n in range(each) for name in names if (name, n) not in done]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=1) as pool:
        with path.open("a") as file:
            for i, row in enumerate(pool.imap_unordered(_safe, jobs), start=1):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{i}/{len(jobs)} {row['door']} {row['batch']}: {len(row['faults'])} faults")
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
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--only", help="one door")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="batches at a time")
    raise SystemExit(1 if run(**vars(parser.parse_args())) else 0)
