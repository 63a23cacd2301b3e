"""The quickstart's raw files, made from what is on the machine.

Real scanned digits, speech, captions, prose and code.

Images are scikit-learn's `load_digits` (1,797 real 8x8 scans) enlarged to 32x32, the training ones
also slightly moved. Audio is the same ten digits spoken by
espeak-ng in 12 voices x 4 rates x 5 pitches. Text is the captions plus docstrings and short
functions of the Python
standard library. The split is fixed by `SPLIT_SEED`, whatever the training seed: no image and no
(voice, rate, pitch)
of val or test occurs in train.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import multiprocessing
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from mm.quickstart.speech import PITCHES, RATES, VOICES, speaker, trim

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_SEED = 20261120
SAMPLE_RATE = 16_000
IMAGE_SIZE = 32
# of each training scan: itself and slightly moved ones; 1,347 scans alone are learnt by heart
VERSIONS = 6
HELD_OUT = {"test": 30, "val": 15}  # images a digit, and (voice, rate, pitch) combinations
TEXT_BYTES = 500_000  # of docstrings and functions
PIECE_BYTES = 420  # longest text document: fits one packed row after tokenisation


def make_source(out: str | Path) -> dict[str, Any]:
    """Write ``out/{images,audio}``, ``out/manifest.jsonl`` and ``out/text.jsonl``; safe to re-run.

    Returns:
        counts by split and kind.
    """
    out = Path(out)
    done = out / "counts.json"
    if done.is_file():
        return json.loads(done.read_text())
    for name in ("images", "audio"):
        (out / name).mkdir(parents=True, exist_ok=True)
    # One generator each: changing one kind of file leaves the split of the others alone.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as beside:
        drawing = beside.submit(
            _images, out, *(np.random.default_rng((SPLIT_SEED, i)) for i in (0, 3))
        )
        clips = _clips(out, np.random.default_rng((SPLIT_SEED, 1)))
        texts = _texts()
        images = drawing.result()
    rows = []
    for number, split in enumerate(("train", "val", "test")):
        rng = np.random.default_rng((SPLIT_SEED, 2, number))
        for digit in range(10):
            scans, voices = images[split, digit], clips[split, digit]
            n = max(
                len(scans), len(voices)
            )  # every scan and every clip stands in at least one triple
            for i in range(n):
                key = f"{split}-{digit}-{i:04d}"
                word = WORDS[digit]
                caption = word if rng.random() < 0.5 else f"the digit {word}"
                rows.append({
                    "key": key, "image": scans[i % len(scans)], "audio": voices[i % len(voices)],
                    "text": caption, "label": word, "split": split,
                })  # fmt: skip
    _write_jsonl(out / "manifest.jsonl", rows)
    _write_jsonl(out / "text.jsonl", texts)
    counts: dict[str, Any] = {
        split: {
            "triples": sum(r["split"] == split for r in rows),
            "texts": sum(t["split"] == split for t in texts),
        }
        for split in ("train", "val", "test")
    }
    done.write_text(json.dumps(counts))
    return counts


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def _images(
    out: Path, rng: np.random.Generator, moves: np.random.Generator
) -> dict[tuple[str, int], list[str]]:
    """Enlarge the scans and split them by ``rng``, the same number of each digit held out.

    Move copies of the training ones by ``moves``.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    places: dict[tuple[str, int], list[str]] = {}
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(scans.target == digit))
        test, val = HELD_OUT["test"], HELD_OUT["test"] + HELD_OUT["val"]
        # Keeps the split of the first measured release, whose two moved copies of each training
        # scan took five draws each from this generator.
        rng.random(2 * 5 * len(order[val:]))
        for split, members in (
            ("test", order[:test]),
            ("val", order[test:val]),
            ("train", order[val:]),
        ):
            names = []
            for version in range(VERSIONS if split == "train" else 1):
                for i in members:
                    small = Image.fromarray((scans.images[i] * (255 / 16)).round().astype(np.uint8))
                    picture = small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
                    if version:
                        picture = _moved(picture, moves)
                    mark = "abcdefgh"[version] if version else ""
                    name = f"images/{split}-{digit}-{i:04d}{mark}.png"
                    picture.save(out / name)
                    names.append(name)
            places[split, digit] = names
    return places


def _moved(picture: Any, rng: np.random.Generator) -> Any:
    """Turn, scale, slant and shift a picture a little about its centre."""
    from PIL import Image

    turn, scale = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.9, 1.1)
    slant, (dx, dy) = rng.uniform(-0.12, 0.12), rng.uniform(-2, 2, 2)
    cos, sin, centre = np.cos(turn) / scale, np.sin(turn) / scale, (IMAGE_SIZE - 1) / 2
    a, b, d, e = cos, sin + slant, -sin, cos
    c = centre - a * (centre + dx) - b * (centre + dy)
    f = centre - d * (centre + dx) - e * (centre + dy)
    return picture.transform(
        picture.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC
    )


def _clips(out: Path, rng: np.random.Generator) -> dict[tuple[str, int], list[str]]:
    """Speak every digit in every (voice, rate, pitch); whole combinations are held out."""
    import soundfile
    import torch
    from torchaudio.transforms import Resample

    combos = list(itertools.product(VOICES, RATES, PITCHES))
    order = [combos[i] for i in rng.permutation(len(combos))]
    test, val = HELD_OUT["test"], HELD_OUT["test"] + HELD_OUT["val"]
    split_of = {
        c: "test" if i < test else "val" if i < val else "train" for i, c in enumerate(order)
    }
    places: dict[tuple[str, int], list[str]] = {}
    with speaker() as one:
        resample = Resample(one.sample_rate, SAMPLE_RATE)  # keeps its kernel between clips
        for combo in track(order, description="speaking"):
            voice, rate, pitch = combo
            for digit, word in enumerate(WORDS):
                wave = torch.from_numpy(trim(one.say(word, voice, rate, pitch)))
                wave = resample(wave).numpy()
                wave = wave * (0.5 / max(1e-4, float(np.abs(wave).max())))
                split = split_of[combo]
                name = f"audio/{split}-{digit}-{voice}-{rate}-{pitch}.wav"
                soundfile.write(out / name, wave, SAMPLE_RATE, subtype="PCM_16")
                places.setdefault((split, digit), []).append(name)
    for names in places.values():
        rng.shuffle(names)
    return places


def _texts() -> list[dict[str, Any]]:
    """Docstrings and short functions of the standard library, deduplicated.

    Split by the hash of the text.
    """
    rows, seen, total = [], set(), 0
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [*library.glob("*.py"), *library.glob("*/*.py")]
    for file in sorted(files, key=lambda f: hashlib.sha256(f.name.encode()).hexdigest()):
        if (
            "site-packages" in file.parts
            or "test" in file.parts
            or file.parent.name.startswith("_")
        ):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            tree, lines = ast.parse(source), source.splitlines(keepends=True)
        except (SyntaxError, UnicodeDecodeError):
            continue  # the standard library ships a few deliberately broken files
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                continue
            found = [ast.get_docstring(node)]
            if isinstance(node, ast.FunctionDef):
                found.append("".join(lines[node.lineno - 1 : node.end_lineno]))
            for text in found:
                for piece in _pieces(text or ""):
                    digest = hashlib.sha256(piece.encode()).hexdigest()
                    if digest in seen or len(piece) < 60:
                        continue
                    seen.add(digest)
                    share = int(digest[:8], 16) / 0xFFFFFFFF
                    split = "test" if share < 0.04 else "val" if share < 0.06 else "train"
                    rows.append({"key": f"stdlib-{digest[:16]}", "text": piece, "split": split})
                    total += len(piece.encode())
        if total > TEXT_BYTES:
            break
    return rows


def _pieces(text: str) -> list[str]:
    """Cut a text on line borders into pieces of at most `PIECE_BYTES`."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        if len((piece + line).encode()) > PIECE_BYTES:
            pieces.append(piece)
            piece = ""
        piece += line
    pieces.append(piece)
    return [p.strip("\n") for p in pieces if len(p.encode()) <= PIECE_BYTES]


if __name__ == "__main__":
    import sys

    make_source(sys.argv[1])
