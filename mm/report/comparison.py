"""A fine-tuning beside what it began from: its ``comparison.json``."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from mm.report.figures import LOWER_IS_BETTER
from mm.report.folder import Folder, number
from mm.report.read import RunData
from mm.report.words import amount, facts, grid, pretty

OF = {"own": "New data, held out", "base": "Data of the base"}


def comparison(run: RunData) -> str:
    """Figures of base and tuned model by whose data they are, then the cost; "" without any."""
    told = Folder(run.folder, run.notes).json("comparison.json")
    given = told.get("rows") if isinstance(told, Mapping) else None
    rows = [row for row in given if isinstance(row, Mapping)] if isinstance(given, list) else []
    parts = []
    for of, title in OF.items():
        found = {
            pretty(str(row.get("name"))[:80]): _cells(row) for row in rows if row.get("of") == of
        }
        parts += [f"<h3>{escape(title)}</h3>{grid(found)}"] if found else []
    cost = told.get("cost") if isinstance(told, Mapping) else None
    if isinstance(cost, Mapping) and parts:
        parts.append(f"<h3>Cost</h3>{facts(cost)}")
    return "".join(parts)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    unit = str(row.get("unit") or "")
    base, tuned = number(row.get("base")), number(row.get("tuned"))
    change = None
    if base is not None and tuned is not None and base != tuned:
        lower = LOWER_IS_BETTER.search(str(row.get("name"))) is not None
        change = "better" if (tuned < base) == lower else "worse"
    return {
        "base": amount(base, unit),
        "tuned": amount(tuned, unit),
        "change": change,
        "chance": amount(row["chance"], unit) if number(row.get("chance")) is not None else None,
        "n": row.get("n"),
    }
