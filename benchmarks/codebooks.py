"""Four codebooks of a codec flat, by the delay pattern and by a depth transformer, side by side.

    python benchmarks/codebooks.py DIR [--seeds 3] [--steps 300]

DIR holds spoken-digits.tar (or what has its shape). Writes runs/members; a part that is done is not
done again. Bits a code are those of held-out recordings, given their words, an end counted as a
code. What it reached stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from members import OUT, PARTS, ROOT, mm

WAYS = ("flattened", "delay", "depth")
CODEC = ("model.quantizer.n_codebooks=4", "model.quantizer.codebook_size=256")


def prepare(source: Path) -> None:
    """Recordings with their words, a codec of four codebooks, a text tokenizer, their tokens."""
    part = PARTS["digits"]
    data, tokens, made = (OUT / kind / "codes" for kind in ("data", "tokens", "tokenizers"))
    given = (str(source / part.archive), "--out", str(data), "--val-share", "0.1", *part.pack)
    mm("data", "pack", *given, done=data)
    for modality, config, *more in (("audio", "audio.yaml", *CODEC), part_of_text()):
        given = (str(ROOT / "configs" / "tokenizer" / config), "--data", str(data))
        to = made / modality
        mm("tokenizer", "train", *given, "--out", str(to), *more, done=to / "model")
    given = (str(data), "--tokenizers", str(made), "--out", str(tokens))
    mm("data", "pack", *given, done=tokens)


def part_of_text() -> tuple[str, ...]:
    """Modality, config and changes of the text tokenizer."""
    config, *changes = PARTS["digits"].tokenizers["text"].split()
    return "text", Path(config).name, *changes


def run(way: str, seed: int, steps: int) -> dict[str, float]:
    """Bits a code, accuracy, and seconds a step of one run."""
    folder = OUT / f"{way}_{seed}"
    config = str(ROOT / "configs" / "members" / f"{way}.yaml")
    changes = (f"name={folder.name}", f"seed={seed}", f"stages.0.budget.steps={steps}")
    mm("train", config, *changes, done=folder / "model")
    found: dict[str, float] = {}
    seconds = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        each = json.loads(line)
        if "val/audio/loss" in each:
            found["bits a code"] = each["val/audio/loss"] / math.log(2)
        if "perf/step_seconds" in each:
            seconds.append(each["perf/step_seconds"])
        for key, value in each.items():
            if key.endswith("audio_to_text_accuracy"):
                found["audio to text"] = float(value)
    return {**found, "seconds a step": statistics.median(seconds)}


def main() -> None:
    """Print a line a layout: means, each seed behind them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with the archive")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    prepare(args.source)
    for way in WAYS:
        found = [run(way, seed, args.steps) for seed in range(args.seeds)]
        cells = []
        for name in found[0]:
            values = [each[name] for each in found]
            each = ", ".join(f"{v:.3f}" for v in values)
            cells.append(f"{name} {statistics.mean(values):.3f} ({each})")
        print(f"{way}: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
