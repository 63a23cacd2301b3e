"""A run folder that a page may be made of, and the kinds of values found in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.data.modalities.base import modalities
from mm.reading import parse_json

HUGE, TINY = 1e100, 1e-100  # beyond them a number is no measurement, and no axis can show it
MAX_TEXT_BYTES = 1_000_000_000  # of a metrics.jsonl; more is no run's


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over steps: ``steps`` and finite ``values`` of equal length."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the callback `samples` made of one prompt, over steps.

    ``prompt``: modality -> text, or the file of a picture or a sound; None: it is not known.
    """

    name: str
    to: str
    prompt: Mapping[str, str | Path] | None
    files: dict[int, list[Path]]


class Folder:
    """A folder whose files may be read: no link of it leads to a file outside.

    Attributes:
        notes: what could not be read, and why.
    """

    def __init__(self, path: Path, notes: list[str]):
        self.path, self.notes = path, notes
        self._real = path.resolve()

    def holds(self, path: Path) -> bool:
        """True for a path inside; one that a link leads out of is noted."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a loop of links
            return False
        if real.is_relative_to(self._real):
            return True
        said = f"{path.relative_to(self.path)}: leads out of the run folder, not shown"
        if said not in self.notes:
            self.notes.append(said)
        return False

    def file(self, name: str) -> Path | None:
        """A regular file inside, or None."""
        path = self.path / name
        try:
            return path if path.is_file() and self.holds(path) else None
        except (OSError, ValueError):
            return None

    def text(self, name: str) -> str:
        """The text of a file, "" when there is none."""
        path = self.file(name)
        try:
            if path is None or path.stat().st_size > MAX_TEXT_BYTES:
                return ""
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def json(self, name: str) -> Any:
        """The content of a JSON file, {} when there is none or it is damaged."""
        text = self.text(name)
        if not text.strip():
            return {}
        try:
            return parse_json(text)
        except ValueError as error:
            self.notes.append(f"{name} is not valid JSON: {str(error)[:200]}")
            return {}

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a JSONL file; other lines are counted and left out."""
        rows, broken = [], 0
        for line in self.text(name).splitlines():
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                broken += bool(line.strip())
        if broken:
            self.notes.append(f"{name}: {broken} unreadable line(s) left out")
        return rows

    def media(self, name: str, *, texts: bool = False) -> list[Path]:
        """Pictures and sounds below a folder, with ``texts`` texts, too; in the order of names."""
        wanted = {suffix for suffix, kind in shown_as().items() if texts or kind != "text"}
        return sorted(
            p
            for p in (self.path / name).rglob("*")
            if p.suffix.lower() in wanted and p.is_file() and self.holds(p)
        )


def shown_as() -> dict[str, str]:
    """Suffix of a sample's file -> how a page shows it: "image", "audio" or "text"."""
    return {f".{e}": m.shown_as for m in modalities() for e in m.extensions}


def number(value: Any) -> float | None:
    """A value that can be drawn; None of anything else, such as an integer of 400 digits."""
    if not isinstance(value, (bool, int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    if not math.isfinite(found) or abs(found) > HUGE:
        return None
    return 0.0 if abs(found) < TINY else found
