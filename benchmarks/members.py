"""Members of the plug points on real files, by the ordinary commands: a table of figures and bars.

    python benchmarks/members.py DIR [--only photos] [--seeds 3]

DIR holds cifar10-images.tar, spoken-digits.tar, tinyshakespeare.txt (or what has their shape) and
what benchmarks/series_windows.py, moving_photographs.py and digit_scans.py wrote. Writes
runs/members; a part that is done is not done again. What it reached stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("runs/members")
WORDS = "zero one two three four five six seven eight nine".split()


class Part(NamedTuple):
    """One config with its data, its figure and its bar."""

    archive: str
    pack: tuple[str, ...]
    tokenizers: dict[str, str]  # modality -> config with overrides
    figure: str
    bar: float
    minutes: float
    at_most: bool = False  # lower is better


PARTS = {
    "photos": Part(
        "cifar10-images.tar",
        ("--caption-from", "parent"),
        {
            "image": "configs/tokenizer/patches.yaml",
            "text": "configs/tokenizer/text.yaml tokenizer.vocab_size=300",
        },
        "image_to_text_accuracy",
        0.55,
        15,
    ),
    "digits": Part(
        "spoken-digits.tar",
        (
            "--caption-regex",
            r"(?P<text>\d)_",
            *(w for i, n in enumerate(WORDS) for w in ("--caption-map", f"{i}={n}")),
        ),
        {
            "audio": "configs/tokenizer/mel.yaml",
            "text": "configs/tokenizer/text.yaml tokenizer.vocab_size=300",
        },
        "audio_to_text_accuracy",
        0.98,
        8,
    ),
    "ctc": Part(
        "spoken-digits.tar",
        (
            "--caption-regex",
            r"(?P<text>\d)_",
            *(w for i, n in enumerate(WORDS) for w in ("--caption-map", f"{i}={n}")),
        ),
        {
            "audio": "configs/tokenizer/mel.yaml",
            "text": "configs/tokenizer/text.yaml tokenizer.vocab_size=300",
        },
        "audio_to_text_word_error_rate",
        0.03,
        8,
        at_most=True,
    ),
    "contrast": Part(
        "cifar10-images.tar",
        ("--caption-from", "parent"),
        {
            "image": "configs/tokenizer/patches.yaml",
            "text": "configs/tokenizer/text.yaml tokenizer.vocab_size=300",
        },
        "image_to_text_recall_at_1",
        0.5,
        15,
    ),
    "blocks": Part(
        "tinyshakespeare.txt",
        ("--val-share", "0.1"),
        {"text": "configs/tokenizer/text.yaml tokenizer.vocab_size=512"},
        "text_ids_a_forward",
        1.2,
        8,
    ),
    "video": Part(
        "moving-photographs.tar",
        (),
        {
            "video": "configs/tokenizer/video.yaml tokenizer.fps=8 tokenizer.size=48",
            "text": "configs/tokenizer/text.yaml tokenizer.vocab_size=300",
        },
        "video_to_text_accuracy",
        0.9,
        8,
    ),
    "array": Part(
        "digit-scans",
        ("--caption-from", "parent"),
        {
            "array": "configs/tokenizer/array.yaml",
            "text": "configs/tokenizer/text.yaml tokenizer.vocab_size=300",
        },
        "array_to_text_accuracy",
        0.96,
        4,
    ),
    "series": Part(
        "taylor-windows.tar",
        (),
        {"time_series": "configs/tokenizer/series.yaml"},
        "time_series_mae_ratio",
        1.0,
        8,
        at_most=True,
    ),
}


def mm(*words: str, done: Path | None = None) -> float:
    """Run one command of the program, unless ``done`` is there; the seconds that it took."""
    if done is not None and done.exists():
        return 0.0
    print(f"$ mm {shlex.join(words)}", flush=True)
    begun = time.perf_counter()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "disabled"}
    subprocess.run([sys.executable, "-m", "mm", *words], env=env, check=True)
    return time.perf_counter() - begun


def run(name: str, part: Part, source: Path, seed: int) -> tuple[float, float]:
    """Figure and minutes of one part: pack, tokenizers, training and evaluation."""
    seconds = 0.0
    data, tokens = OUT / "data" / name, OUT / "tokens" / name
    archive = str(source / part.archive)
    seconds += mm("data", "pack", archive, "--out", str(data), *part.pack, done=data)
    for modality, words in part.tokenizers.items():
        config, *changes = words.split()
        to = OUT / "tokenizers" / name / modality
        given = (str(ROOT / config), "--data", str(data), "--out", str(to), *changes)
        seconds += mm("tokenizer", "train", *given, done=to / "model")
    made = ("--tokenizers", str(OUT / "tokenizers" / name), "--out", str(tokens))
    seconds += mm("data", "pack", str(data), *made, done=tokens)
    folder = OUT / f"{name}_{seed}"
    config = str(ROOT / "configs" / "members" / f"{name}.yaml")
    seconds += mm("train", config, f"name={folder.name}", f"seed={seed}", done=folder / "model")
    results = folder / "results.json"
    seconds += mm("eval", str(folder), "--json", str(results), done=results)
    found = json.loads(results.read_text())
    figures = {row["name"]: float(row["value"]) for row in found["figures"]}
    print(json.dumps(figures, indent=1))
    return figures[part.figure], seconds / 60


def main() -> None:
    """Print a line a part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with the archives")
    parser.add_argument("--only", choices=[*PARTS], action="append")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    lines = []
    for name in args.only or PARTS:
        part = PARTS[name]
        found = [run(name, part, args.source, seed) for seed in range(args.seeds)]
        figures = [figure for figure, _ in found]
        minutes = ", ".join(f"{m:.1f}" for _, m in found)
        mean = statistics.mean(figures)
        met = "met" if (mean <= part.bar if part.at_most else mean >= part.bar) else "missed"
        each = ", ".join(f"{f:.3f}" for f in figures)
        lines.append(
            f"{name}: {part.figure} {mean:.3f} ({each}); bar {part.bar}: {met}; "
            f"minutes {minutes} (bar {part.minutes:.0f})"
        )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
