"""What a run was made from, and what it made: its `lineage.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.report.folder import Folder
from mm.report.read import RunData
from mm.report.words import grid

SHOWN = ("kind", "version", "paths", "source", "samples", "made_from")


def lineage(run: RunData) -> str:
    """A table: data, tokenizers, the run before, the saved model; "" where nothing says so."""
    told = Folder(run.folder, run.notes).json("lineage.json")
    rows: dict[str, dict[str, Any]] = {}
    for way in ("inputs", "outputs"):
        found = told.get(way) if isinstance(told, Mapping) else None
        for row in found if isinstance(found, list) else ():
            if isinstance(row, Mapping) and row.get("kind") != "code":
                kept = {k: _flat(row[k]) for k in SHOWN if k in row}
                rows[str(row.get("name"))[:80]] = {"role": way.removesuffix("s"), **kept}
    return grid(rows)


def _flat(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in list(value.items())[:6])
    return ", ".join(map(str, value[:3])) if isinstance(value, list) else value
