"""DPO on the quickstart's generated pictures: preferred is what the judge reads right.

    python benchmarks/preference.py [--samples 2000] [--seeds 3]

Needs runs/quickstart (`mm quickstart`). The model draws a picture for each caption of the training
split, a judge of real pictures reads it, and each that it reads wrong becomes a pair with one that
it reads right, for the same word. Prints judged accuracy and recognition before and after, on the
test split. Writes runs/members. What it reached stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT, BASE = Path("runs/members"), Path("runs/quickstart")
FIGURES = ("text_to_image_accuracy", "image_to_text_accuracy")


def mm(*words: str) -> None:
    """Run one command of the program."""
    print(f"$ mm {shlex.join(words)}", flush=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "disabled"}
    subprocess.run([sys.executable, "-m", "mm", *words], env=env, check=True)


def tasks() -> list[Any]:
    """Drawing at the temperature of training, and reading, of the test split."""
    from mm.registry import TASKS

    data = {"data": str(BASE / "data" / "digits")}
    drawn = {
        "kind": "judged_generation",
        "sources": ["text"],
        "to": "image",
        "settings": [{"temperature": 1.0, "cfg_scale": 1.0}],
        "judge_limit": 2000,
        "reconstruction": False,
    }
    read = {"kind": "recognition", "sources": ["image"]}
    return [TASKS.parse(drawn | data), TASKS.parse(read | data)]


def figures(folder: Path) -> dict[str, float]:
    """Of a saved model, kept beside it."""
    from mm.decoders.generate import Generator

    kept = OUT / f"preference_{folder.name}.json"
    if not kept.is_file():
        generator = Generator.from_pretrained(folder / "model")
        found: dict[str, Any] = {}
        for task in tasks():
            found |= task.build().evaluate(generator, seed=0)
        kept.write_text(json.dumps({k: found[k] for k in FIGURES}))
    return json.loads(kept.read_text())


def make_pairs(folder: Path, samples: int) -> int:
    """Write raw samples ``n.000.txt n.001.png n.002.png``: caption, read right, read wrong."""
    from mm.data.modalities.base import get_modality
    from mm.decoders.generate import Generator
    from mm.tasks.base import conditions, read_items
    from mm.tasks.judged_generation import trained_judge

    digits, image = BASE / "data" / "digits", get_modality("image")
    generator = Generator.from_pretrained(BASE / "model")
    items = read_items(digits, "train", ("text",), limit=samples)
    prompts = [conditions(item, ("text",)) for item in items]
    made = generator.generate(prompts, "image", seed=1, temperature=1.0, cfg_scale=1.0)
    judge = trained_judge(digits, "train", "image", (), "label", 2000)
    said = judge.predict(made)
    right: dict[str, list[int]] = {}
    for n, item in enumerate(items):
        if said[n] == item.label:
            right.setdefault(item.label, []).append(n)
    folder.mkdir(parents=True)
    n_pairs = 0
    for n, item in enumerate(items):
        good = right.get(item.label)
        if said[n] == item.label or not good:
            continue
        for best in (good[(5 * n_pairs + i) % len(good)] for i in range(5)):
            name = folder / f"{n_pairs:05d}"
            name.with_suffix(".000.txt").write_text(str(prompts[n]["text"]))
            image.save(made[best], name.with_suffix(".001.png"))
            image.save(made[n], name.with_suffix(".002.png"))
            n_pairs += 1
    return n_pairs


def main() -> None:
    """Print a line a figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    data, tokens = OUT / "data" / "pairs", OUT / "tokens" / "pairs"
    if not tokens.exists():
        raw = OUT / "raw_pairs"
        print(f"{make_pairs(raw, args.samples)} pairs")
        mm("data", "pack", str(raw), "--segments", "--val-share", "0.1", "--out", str(data))
        words = str(BASE / "model" / "vocabulary.json")
        given = ("--tokenizers", str(BASE / "tokenizers"), "--vocabulary", words)
        mm("data", "pack", str(data), *given, "--out", str(tokens))
    before, after = figures(BASE), []
    for seed in range(args.seeds):
        folder = OUT / f"preference_{seed}"
        if not (folder / "model.step").is_file():
            config = str(ROOT / "configs" / "members" / "preference.yaml")
            mm("train", config, f"name={folder.name}", f"seed={seed}")
        after.append(figures(folder))
    for name in FIGURES:
        each = ", ".join(f"{found[name]:.3f}" for found in after)
        mean = statistics.mean(found[name] for found in after)
        print(f"{name}: before {before[name]:.3f}, after {mean:.3f} ({each})")


if __name__ == "__main__":
    main()
