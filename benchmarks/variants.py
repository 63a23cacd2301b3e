"""Members that change one part of a stack, side by side at equal steps: held-out nats a token.

    python benchmarks/variants.py DIR [--only NAME] [--seeds 1] [--steps 150]

DIR holds tinyshakespeare.txt. Feed-forwards, blocks, linears and a backbone on
configs/members/variants.yaml, all in this process. Writes runs/members; a run that is done is not
done again. What it reached stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from masked_and_causal import prepare
from members import OUT, ROOT

from mm.config import read
from mm.run import Run
from mm.trainer.log import metrics
from mm.trainer.loop import train

AT = {"ffn": ("backbone", "ffn"), "block": ("backbone", "block"), "linear": ("linear",)}
NAMED = {  # without a file of their own
    "ffn/rwkv_ffn": {"kind": "rwkv_ffn"},
    "block/layer_drop": {"kind": "layer_drop"},
    "backbone/looped": {"kind": "looped", "pattern": "attention", "depth": 1, "loops": 3},
}
FILES = ("ffn/geglu", "ffn/relu_squared", "ffn/sub_norm", "ffn/moe", "ffn/switch", "ffn/nested",
         "block/sandwich", "block/parallel", "block/hyper", "linear/bitnet")  # fmt: skip
NAMES = ("swiglu, prenorm, dense", *FILES, *NAMED)


def config_of(name: str, seed: int, steps: int) -> Run:
    """The run of one variant."""
    values: dict[str, Any] = Run.load(ROOT / "configs" / "members" / "variants.yaml").to_dict()
    plug, _, kind = name.partition("/")
    values |= {"name": f"variants_{kind or 'plain'}_{steps}_{seed}", "seed": seed}
    values["stages"][0] |= {"budget": {"steps": steps}, "eval_every": steps}
    if kind:
        own = NAMED.get(name) or read(ROOT / "configs" / f"{name}.yaml")
        node = values["model"]
        *above, last = AT.get(plug, ("backbone",))
        for key in above:
            node = node[key]
        node[last] = own
    return Run.model_validate(values)


def main() -> None:
    """Print a line a variant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with tinyshakespeare.txt")
    parser.add_argument("--only", choices=NAMES, action="append")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    prepare(args.source / "tinyshakespeare.txt")
    for name in args.only or NAMES:
        found = []
        for seed in range(args.seeds):
            run = config_of(name, seed, args.steps)
            if not (OUT / run.name / "model").exists():
                train(run)
            rows = metrics.read(run.folder / "metrics.jsonl")
            found.append([row["val/loss"] for row in rows if "val/loss" in row][-1])
        each = ", ".join(f"{x:.3f}" for x in found)
        print(f"{name}: {statistics.mean(found):.3f} ({each}) nats a token", flush=True)


if __name__ == "__main__":
    main()
