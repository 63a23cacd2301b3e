"""Distillation of the quickstart's model into half its depth, beside that depth from nothing.

    python benchmarks/half_depth.py [--seeds 3] [--steps 250]

Needs runs/quickstart (`mm quickstart`). Prints a table; writes runs/members. A run that is done is
not done again. What it reached stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("runs/members")
WAYS = {"distilled": "0.9", "from nothing": "0"}  # share of the teacher
FIGURES = ("val/image/loss", "val/audio/loss", "val/text/loss", "image_to_text_accuracy")


def run(share: str, seed: int, steps: int) -> dict[str, float]:
    """Figures of one run."""
    folder = OUT / f"half_depth_{share}_{seed}_{steps}"
    if not (folder / "model.step").is_file():
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        words = [
            str(ROOT / "configs" / "members" / "distil.yaml"),
            f"name={folder.name}",
            f"seed={seed}",
            f"stages.0.objective.alpha={share}",
            f"stages.0.budget.steps={steps}",
            f"stages.0.eval_every={steps}",
        ]
        env = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "disabled"}
        subprocess.run([sys.executable, "-m", "mm", "train", *words], env=env, check=True)
    found: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            name = key.rpartition("/")[2] if key.startswith("eval/") else key
            if name in FIGURES:
                found[name] = float(value)
    return found


def main() -> None:
    """Print a line a figure: means, each seed behind them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    seeds = range(args.seeds)
    rows = {way: [run(share, s, args.steps) for s in seeds] for way, share in WAYS.items()}
    for figure in FIGURES:
        cells = []
        for way, found in rows.items():
            values = [each[figure] for each in found]
            each = ", ".join(f"{v:.3f}" for v in values)
            cells.append(f"{way} {statistics.mean(values):.3f} ({each})")
        print(f"{figure}: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
