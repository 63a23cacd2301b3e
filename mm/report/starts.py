"""How a launched run was started, and again after failures: its `launch/history.jsonl`."""

from __future__ import annotations

from typing import Any

from mm.report.folder import Folder, number
from mm.report.read import RunData
from mm.report.words import duration, grid


def starts(run: RunData) -> str:
    """A table of attempts: nodes, steps, steps lost, what ended it; "" where there was one only."""
    rows: dict[str, dict[str, Any]] = {}
    lines = Folder(run.folder, run.notes).lines("launch/history.jsonl")
    for line in lines:
        nodes = line.get("nodes")
        first, last = number(line.get("started")), number(line.get("ended"))
        why = str(line.get("why") or "").strip().splitlines()
        rows[str(line.get("attempt"))[:20]] = {
            "nodes": ", ".join(map(str, nodes[:8])) if isinstance(nodes, list) else None,
            "processes": line.get("world"),
            "from_step": line.get("step_from"),
            "to_step": line.get("step_to"),
            "steps_lost": line.get("steps_lost"),
            "lasted": duration(last - first) if first and last and last > first else None,
            "trains_after_s": line.get("trains_after_s"),
            "failed_node": line.get("node") or None,
            "reason": (why[-1] if why else "all steps are done" if line.get("code") == 0 else None),
        }
    return grid(rows, "attempt") if len(lines) > 1 else ""
