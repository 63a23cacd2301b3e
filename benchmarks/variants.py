"""Members that change one part of a stack, side by side at equal steps: held-out bits per byte.

    python benchmarks/variants.py DIR [--only NAME] [--seeds 1] [--steps 150]

DIR holds tinyshakespeare.txt. Every YAML of configs/block, ffn, linear and embedder, and what
`NAMED` says, on configs/members/variants.yaml, all in this process. Writes runs/members; a run that
is done is not done again. What it reached stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from masked_and_causal import prepare
from members import OUT, ROOT

from mm.config import read
from mm.run import Run
from mm.trainer.log import metrics
from mm.trainer.loop import train

PLAIN = "plain"  # swiglu under prenorm, dense matrices, one table, softmax
KEYS = {
    "block": "model.backbone.block",
    "embedder": "model.embedder",
    "ffn": "model.backbone.ffn",
    "linear": "model.linear",
}
NAMED: dict[str, dict[str, Any]] = {  # key of the run -> value; without a file of their own
    "block/layer_drop": {KEYS["block"]: {"kind": "layer_drop"}},
    "ffn/rwkv_ffn": {KEYS["ffn"]: {"kind": "rwkv_ffn"}},
    "backbone/looped": {
        "model.backbone": {"kind": "looped", "pattern": "attention", "depth": 1, "loops": 3}
    },
    "head/multi_token": {
        "model.heads": {"tokens": {"kind": "multi_token", "ahead": 3}},
        "stages.0.objective.aux_weights": {"multi_token": 1.0},
    },
    "transform/fill_in_the_middle": {
        "stages.0.objective.transform": {"kind": "fill_in_the_middle", "rate": 0.5}
    },
}
# They train few of the weights that they are given, so from nothing they say nothing.
ADAPTING = ("linear/lora", "linear/dora", "linear/qlora")
OF_MODALITIES = ("linear/by_modality",)  # text alone is one
FILES = [
    name
    for folder in KEYS
    for file in sorted((ROOT / "configs" / folder).glob("*.yaml"))
    if (name := f"{folder}/{file.stem}") not in (*ADAPTING, *OF_MODALITIES)
]
NAMES = (PLAIN, *FILES, *NAMED)


def config_of(name: str, seed: int, steps: int) -> Run:
    """The run of one variant."""
    folder, _, kind = name.partition("/")
    changed: dict[str, Any] = dict(NAMED.get(name, {}))
    if kind and not changed:
        changed = {KEYS[folder]: read(ROOT / "configs" / f"{name}.yaml")}
    changed |= {"name": f"variants_{kind or name}_{steps}_{seed}", "seed": seed}
    changed |= {"stages.0.budget.steps": steps, "stages.0.eval_every": steps}
    words = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    return Run.load(ROOT / "configs" / "members" / "variants.yaml", words)


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
            (*_, last) = metrics.read(run.folder / "metrics.jsonl")
            found += [v for k, v in last.items() if k.endswith("/text_bits_per_byte")]
        each = ", ".join(f"{x:.3f}" for x in found)
        print(f"{name}: {statistics.mean(found):.3f} ({each}) bits per byte", flush=True)


if __name__ == "__main__":
    main()
