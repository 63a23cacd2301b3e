"""Steps that `mm explain` has replayed: their samples, and what differs from the steps beside."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, TypeGuard

from mm.report import media
from mm.report.folder import Folder
from mm.report.read import RunData
from mm.report.words import grid

MAX_STEPS, MAX_SAMPLES, MAX_FIGURES, MAX_LETTERS = 8, 8, 10, 400


def explanations(run: RunData) -> str:
    """A part for each step, newest step last; "" where nothing was explained."""
    inside = Folder(run.folder, run.notes)
    root = run.folder / "explain"
    names = sorted(p.name for p in root.glob("step_*") if p.is_dir()) if root.is_dir() else []
    return "".join(_step(inside, f"explain/{name}") for name in names[-MAX_STEPS:])


def _step(inside: Folder, place: str) -> str:
    told = inside.json(f"{place}/explain.json")
    if not isinstance(told, dict) or "step" not in told:
        return ""
    same = "bit by bit as it was" if told.get("same_bits") else "not bit by bit as it was"
    head = (
        f"<h3>Step {escape(str(told['step']))}</h3><p class='note'>Replayed from step "
        f"{escape(str(told.get('from_step')))}, {same}.</p>"
    )
    samples = told.get("samples")
    rows = [_sample(inside, place, s) for s in samples[:MAX_SAMPLES]] if _is_rows(samples) else []
    body = (
        '<div class="scroll"><table class="samples"><thead><tr><th>sample, worst first</th>'
        f"<th>loss</th><th>content</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        if rows
        else ""
    )
    parts = []
    for key, title in (("gradient", "gradient norm by layer"), ("metrics", "figure")):
        found = told.get(key)
        if isinstance(found, Mapping):
            first = dict(list(found.items())[:MAX_FIGURES])
            parts.append(grid({k: v for k, v in first.items() if isinstance(v, Mapping)}, title))
    return head + body + "".join(parts)


def _sample(inside: Folder, place: str, cost: Mapping[str, Any]) -> str:
    by = cost.get("by_modality")
    by = by if isinstance(by, Mapping) else {}
    losses = [f"{_short(cost.get('loss'))}"]
    losses += [
        f"{escape(str(name))} {_short(v.get('loss'))}"
        for name, v in by.items()
        if isinstance(v, Mapping)
    ]
    parts = cost.get("parts")
    shown = "".join(_part(inside, place, p) for p in parts) if _is_rows(parts) else ""
    key = escape(str(cost.get("key"))[:80])
    return f"<tr><th>{key}</th><td>{'<br>'.join(losses)}</td><td>{shown}</td></tr>"


def _part(inside: Folder, place: str, part: Mapping[str, Any]) -> str:
    if isinstance(part.get("text"), str):
        return f"<blockquote>{escape(part['text'][:MAX_LETTERS])}</blockquote>"
    name = part.get("file")
    file = inside.file(f"{place}/{name}") if isinstance(name, str) and "/" not in name else None
    if file is not None:
        return media.figure(file, small=True)
    return f"<small>{escape(str(part.get('note', '')))}</small>"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "not finite"


def _is_rows(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and all(isinstance(row, Mapping) for row in value)
