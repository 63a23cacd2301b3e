"""A mixture of experts beside a dense layer of equal active parameters.

Prints held-out bits per byte, the load of the experts and what was dropped.

    python benchmarks/experts.py DIR [--seeds 3]

DIR holds tinyshakespeare.txt. Runs `configs/members/experts.yaml` by the ordinary commands, and
the same with a dense layer, and writes runs/members; a part that is done is not done again. What
it reached stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from masked_and_causal import prepare
from members import OUT, ROOT, mm

DENSE = "model.backbone.ffn={kind: swiglu, hidden: 352}"
EVEN = 0.2  # bar: how far the fullest and the emptiest expert may be from an even load


def rows_of(name: str, seed: int, *words: str) -> list[dict[str, Any]]:
    """Metrics of a run, which is trained where it is not there."""
    folder = OUT / f"{name}_{seed}"
    file = str(ROOT / "configs" / "members" / "experts.yaml")
    mm("train", file, f"name={folder.name}", f"seed={seed}", *words, done=folder / "model")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figure(rows: list[dict[str, Any]], ending: str, since: int = 0) -> list[float]:
    """Values of all metrics of that ending, from a step on."""
    return [v for r in rows if r["step"] > since for k, v in r.items() if k.endswith(ending)]


def main() -> None:
    """Print a line a seed, and what comes of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    prepare(args.source / "tinyshakespeare.txt")
    gains, fullest, emptiest, dropped = [], [], [], []
    for seed in range(args.seeds):
        experts, dense = rows_of("experts", seed), rows_of("dense", seed, DENSE)
        bits = [figure(rows, "text/bits_per_byte")[-1] for rows in (experts, dense)]
        gains.append(bits[1] - bits[0])
        late = max(r["step"] for r in experts) // 2
        fullest.append(statistics.mean(figure(experts, "load_max", late)))
        emptiest.append(statistics.mean(figure(experts, "load_min", late)))
        dropped += figure(experts, "dropped")
        print(f"seed {seed}: experts {bits[0]:.4f}, dense {bits[1]:.4f} bits per byte; load "
              f"{emptiest[-1]:.2f} to {fullest[-1]:.2f} of even")  # fmt: skip
    even = max(fullest) <= 1 + EVEN and min(emptiest) >= 1 - EVEN
    print(
        f"experts better in {sum(g > 0 for g in gains)} of {len(gains)} seeds, by "
        f"{statistics.mean(gains):.4f}; load within {EVEN:.0%}: {'yes' if even else 'no'}; dropped "
        f"{max(dropped, default=0.0):.3f}"
    )


if __name__ == "__main__":
    main()
