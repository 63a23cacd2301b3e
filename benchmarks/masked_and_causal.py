"""Masked modelling, then the same weights as a causal model, and back.

Prints held-out nats beside a start from nothing.

    python benchmarks/masked_and_causal.py DIR [--seeds 3]

DIR holds tinyshakespeare.txt. Runs `configs/members/masked.yaml` and `masked_back.yaml` by the
ordinary commands and writes runs/members; a part that is done is not done again. What it reached
stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from members import OUT, ROOT, mm

STAGES = {"masked": ("masked", "causal"), "masked_back": ("causal", "masked")}


def prepare(source: Path) -> None:
    """Raw shards, tokenizer, token shards."""
    data, tokens, to = (OUT / part / "masked" for part in ("data", "tokens", "tokenizers"))
    mm("data", "pack", str(source), "--out", str(data), "--val-share", "0.1", done=data)
    config = str(ROOT / "configs" / "tokenizer" / "text.yaml")
    given = (config, "--data", str(data), "--out", str(to / "text"), "tokenizer.vocab_size=1024")
    mm("tokenizer", "train", *given, done=to / "text" / "model")
    mm("data", "pack", str(data), "--tokenizers", str(to), "--out", str(tokens), done=tokens)


def held_out(config: str, seed: int) -> list[float]:
    """Held-out nats a token at the end of each stage of a run."""
    folder = OUT / f"{config}_{seed}"
    file = str(ROOT / "configs" / "members" / f"{config}.yaml")
    mm("train", file, f"name={folder.name}", f"seed={seed}", done=folder / "model")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["val/loss"] for row in rows if "val/loss" in row]


def main() -> None:
    """Print a line for each objective: from nothing, and from the other's weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    prepare(args.source / "tinyshakespeare.txt")
    nothing: dict[str, list[float]] = {"masked": [], "causal": []}
    warm: dict[str, list[float]] = {"masked": [], "causal": []}
    for seed in range(args.seeds):
        for config, (first, second) in STAGES.items():
            ends = held_out(config, seed)
            nothing[first].append(ends[0])
            warm[second].append(ends[-1])
    for name in nothing:
        text = lambda found: (
            f"{statistics.mean(found):.3f} ({', '.join(f'{x:.3f}' for x in found)})"
        )
        better = sum(a < b for a, b in zip(warm[name], nothing[name], strict=True))
        print(
            f"{name}: from nothing {text(nothing[name])}, from the other {text(warm[name])} nats a "
            f"token; better in {better} of {args.seeds}"
        )


if __name__ == "__main__":
    main()
