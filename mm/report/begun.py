"""What the networks of a run began with: its ``init_from.json``."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from mm.report.folder import Folder
from mm.report.read import RunData
from mm.report.words import grid

LISTS = ("taken", "new", "left")
MOST_NAMES = 2_000  # of a list that a page shows


def begun(run: RunData) -> str:
    """A table of counts by network, then every name; "" where nothing began from a folder."""
    told = Folder(run.folder, run.notes).json("init_from.json")
    rows: dict[str, dict[str, Any]] = {}
    lists = []
    for name, each in told.items() if isinstance(told, Mapping) else ():
        if not isinstance(each, Mapping):
            continue
        name = str(name)[:80]
        found = {key: _names(each.get(key)) for key in LISTS}
        partial = each.get("partial")
        some = partial if isinstance(partial, Mapping) else {}
        rows[name] = {
            "folder": str(each.get("folder"))[:300],
            "step": each.get("step"),
            **{key: len(names) for key, names in found.items()},
            "in part": ", ".join(f"{k}: {v}" for k, v in list(some.items())[:6]) or None,
        }
        lists += [_listed(f"{name}: {key}", names) for key, names in found.items() if names]
    return grid(rows, "network") + "".join(lists) if rows else ""


def _names(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _listed(title: str, names: list[str]) -> str:
    text = "\n".join(name[:200] for name in names[:MOST_NAMES])
    summary = f"<summary>{escape(title)}, {len(names)}</summary>"
    return f"<details>{summary}<pre>{escape(text)}</pre></details>"
