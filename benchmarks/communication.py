"""What overlap, messages' dtype, hierarchical partitioning and offload cost or save: steps in turn.

python benchmarks/communication.py [--processes 2] [--steps 12] [--rounds 3] [--out DIR]

A model of 20 million parameters on this repository's own source, as bytes. Each setting is a run of
its own; rounds take them in turn, and a setting's time is the median of all its steps but the first
three of a run. On a CPU messages are gloo's and take the cores that compute: overlap gains what a
process would wait. `offload: nvme` needs libaio.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from zero_stages import prepare

WARM = 3
MODEL = ["model.d_model=512", "stages.0.data.seq_len=128", "stages.0.data.batch_size=4"]
OVERLAP = "engine.communication.overlap_comm=true"
HOST = "engine.offload.optimizer=cpu"


def settings(swap: Path) -> dict[str, list[str]]:
    """Changes of the config by name; each is judged beside the first of its stage."""
    out: dict[str, list[str]] = {}
    for stage in range(4):
        at = [f"engine.zero_stage={stage}"]
        plain = [*at, "engine.communication.overlap_comm=false"]
        out[f"stage {stage}"] = plain
        out[f"stage {stage}, overlap"] = [*at, OVERLAP]
        out[f"stage {stage}, gradients bf16"] = [*plain, "engine.communication.dtype=bf16"]
        if stage:
            out[f"stage {stage}, optimizer on the host"] = [*plain, HOST]
    three = out["stage 3"]
    out["stage 3, hpz 2"] = [*three, "engine.communication.hpz_partition_size=2"]
    out["stage 3, all on the host"] = [*three, HOST, "engine.offload.parameters=cpu"]
    disk = ["engine.offload.optimizer=nvme", f"engine.offload.folder={swap}"]
    out["stage 3, optimizer on a disk"] = [*three, *disk]
    return out


def seconds(config: Path, out: Path, changes: list[str], steps: int, n: int) -> list[float]:
    """Of each step of one run, without the first."""
    shutil.rmtree(out / "run", ignore_errors=True)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    told = [*MODEL, *changes, "name=run", f"out={out}", "engine.precision=fp32"]
    told += [f"stages.0.budget.steps={steps}", "stages.0.eval_every=0", "tracking.mode=disabled"]
    command = [sys.executable, *launch, "-m", "mm", "train", str(config), *told]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(changes)}: {done.stderr[-1500:]}")
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row][WARM:]


def show(found: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(each) for name, each in found.items()}
    print("| setting | s a step | of its stage |\n|---|---|---|")
    for name, s in medians.items():
        plain = medians.get(name.partition(",")[0], float("nan"))
        print(f"| {name} | {s:.3f} | {s / plain:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="settings whose name has this")
    parser.add_argument("--out", type=Path, default=Path("runs/communication"))
    args = parser.parse_args()
    config = prepare(args.out)
    chosen = {k: v for k, v in settings(args.out / "swap").items() if args.only in k}
    found: dict[str, list[float]] = {name: [] for name in chosen}
    for i in range(args.rounds):
        for name, changes in chosen.items():
            print(f"round {i + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            found[name] += seconds(config, args.out, changes, args.steps, args.processes)
        show(found)
    (args.out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
