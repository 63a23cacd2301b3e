"""What each surgery leaves of a trained model: held-out nats a token while it is trained on.

    python benchmarks/surgeries.py DIR [--only KIND] [--seeds 3] [--steps 100]

DIR holds tinyshakespeare.txt. A stack of configs/members/variants.yaml is trained for 300 steps;
each operation makes another model of it, which is trained on, beside the same shape from nothing.
All in this process. Writes runs/members; a run that is done is not done again. What it reached
stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from masked_and_causal import prepare
from members import OUT
from variants import PLAIN, config_of

from mm.init_from import InitFrom
from mm.layout import Doc, Layout
from mm.model.model import Batch, Model
from mm.run import Run
from mm.surgery.rank_heads import most_recent, recency_ratios
from mm.tasks.base import open_split
from mm.trainer.log import metrics
from mm.trainer.loop import train
from mm.trainer.warm_start import config_at_start

PARENT_STEPS, EVERY = 300, 25
NONE = "none"  # the same model trained on
SURGERIES: dict[str, dict[str, Any]] = {
    NONE: {},
    "deepen": {"times": 2},
    "widen": {"hidden": 512},
    "keep_layers": {"layers": [0, 2]},
    "pool_heads": {"kv_heads": 2},
    "prune_heads": {},  # two of four in each layer: those that look nearby most
    "linearize": {},
}


def recent_heads(folder: Path, heads: int = 2, n_texts: int = 40) -> dict[str, list[int]]:
    """Heads of each layer that a recurrence can replace best, by what training texts show."""
    model = Model.from_pretrained(folder)
    assert model.vocabulary is not None
    texts, first = (
        open_split(OUT / "tokens" / "masked", "train"),
        model.vocabulary.range("text").first,
    )
    docs = [torch.as_tensor(texts.tokens(i)["text"][:126].astype("int64")) for i in range(n_texts)]
    batches = (Batch.of_ids(doc[None] + first, Layout.from_rows([[Doc(len(doc))]])) for doc in docs)
    return most_recent(recency_ratios(model, batches), heads)


def curve(run: Run) -> list[float]:
    """Held-out nats a token at each evaluation of a run, which is trained where it is not there."""
    if not (OUT / run.name / "model").exists():
        train(run)
    rows = metrics.read(run.folder / "metrics.jsonl")
    return [row["val/loss"] for row in rows if "val/loss" in row]


def pair(kind: str, seed: int, steps: int) -> tuple[list[float], list[float]]:
    """Curves of the operated model and of its shape from nothing."""
    parent = config_of(PLAIN, seed, PARENT_STEPS)
    curve(parent)
    folder = OUT / parent.name / "model"
    settings = dict(SURGERIES[kind])
    if kind == "prune_heads":
        settings["heads"] = recent_heads(folder)
    surgery = [] if kind == NONE else [{"kind": kind, **settings}]
    begun = {"path": str(folder), "surgery": surgery}
    model = config_at_start("init_from", InitFrom.model_validate(begun)).to_dict()
    found = []
    for name, init_from in (("operated", begun), ("nothing", None)):
        values = parent.to_dict() | {"model": model, "init_from": init_from, "seed": seed}
        values["name"] = f"surgery_{kind}_{name}_{steps}_{seed}"
        values["stages"][0] |= {"budget": {"steps": steps}, "eval_every": EVERY}
        found.append(curve(Run.model_validate(values)))
    return found[0], found[1]


def main() -> None:
    """Print a line an operation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with tinyshakespeare.txt")
    parser.add_argument("--only", choices=SURGERIES, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    prepare(args.source / "tinyshakespeare.txt")
    for kind in args.only or SURGERIES:
        pairs = [pair(kind, seed, args.steps) for seed in range(args.seeds)]
        said = []
        for at, step in ((0, EVERY), (-1, args.steps)):
            for name, which in (("operated", 0), ("from nothing", 1)):
                ends = [found[which][at] for found in pairs]
                each = ", ".join(f"{x:.3f}" for x in ends)
                said.append(f"{name} after {step} steps {statistics.mean(ends):.3f} ({each})")
        print(f"{kind}: {'; '.join(said)} nats a token", flush=True)


if __name__ == "__main__":
    main()
