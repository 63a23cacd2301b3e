"""`launch.json` of a run folder: what was started, by whom, and how it ended."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.reading import parse_json

FILE = "launch.json"


def write(home: Path, values: Mapping[str, Any]) -> None:
    """Write ``values``, whole or not at all."""
    home.mkdir(parents=True, exist_ok=True)
    part = home / f"{FILE}.part"
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.replace(home / FILE)


def read(folder: Path) -> dict[str, Any]:
    """The record of a run folder. Raises UserError where there is none."""
    file = folder / "launch" / FILE
    try:
        values = parse_json(file.read_bytes())
    except OSError:
        raise UserError(
            f"{folder}: nothing was launched there (no launch/{FILE}); start with: mm launch"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); delete it") from error
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise UserError(f"{file}: damaged (no kind); delete it")
    return values


def update(home: Path, **changes: Any) -> None:
    """Change some values."""
    write(home, read(home.parent) | changes)


def beats(folder: Path) -> list[dict[str, Any]]:
    """Last word of every rank of the run (`mm/trainer/health/heartbeat.py`), by rank."""
    found = []
    for file in sorted((folder / "health").glob("rank_*.json")):
        try:
            found.append(parse_json(file.read_text()))
        except (OSError, ValueError):
            continue  # it is being written
    return found


def age(seconds_since_epoch: float) -> str:
    """How long ago, in words."""
    seconds = max(0.0, time.time() - seconds_since_epoch)
    for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
