"""Run folders as the trainer and its callbacks write them, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write(folder: Path, name: str, value: Any) -> None:
    """A JSON file, or for a ``.jsonl`` a line for each of ``value``; other text as it is."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        file.write_text(value if isinstance(value, str) else json.dumps(value))


def write_png(file: Path, colour: tuple[int, int, int], size: int = 8) -> bytes:
    """A picture of one colour; its bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), colour, np.uint8)).save(file)
    return file.read_bytes()
