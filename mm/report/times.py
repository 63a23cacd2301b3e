"""Where the time went, as parts that add up to their sum; how the samples were drawn."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from mm.report.folder import number
from mm.report.read import RunData
from mm.report.words import duration, facts, grid, side_by_side

# Phases of `times.json`, by what they are called here.
PHASES = {
    "start": ("start",),
    "building model and data": ("stage",),
    "training": ("step",),
    "waiting for data": ("data",),
    "held-out loss": ("held_out",),
    "log, samples and other callbacks": ("report",),
    "saving checkpoints": ("save",),
    "saving the model": ("export",),
    "evaluation": ("evaluate",),
    "end": ("end",),
}


def times(run: RunData) -> str:
    """Seconds of a training by phase, of an evaluation by task, and the sampling settings."""
    left = ""
    parts = phases(run)
    if parts:
        left = f"<h3>Training</h3>{bars(parts)}"
    seconds = run.results.get("seconds")
    tasks = _positive(seconds if isinstance(seconds, Mapping) else {})
    tasks.pop("total", None)  # of the whole quickstart, see `commands`
    right = ""
    if tasks:
        right = "<h3>Evaluation <small>each task on its own; processes share them</small></h3>"
        right += bars(tasks)
    chosen = run.results.get("sampling")
    if isinstance(chosen, Mapping) and chosen:
        rows = {str(k): v for k, v in chosen.items() if isinstance(v, Mapping)}
        rest = {k: v for k, v in chosen.items() if k not in rows}
        right += f"<h3>Sampling settings</h3>{grid(rows)}{facts(rest)}"
    return side_by_side(left, right)


def phases(run: RunData) -> dict[str, float]:
    """Seconds by phase: of times.json, else of what the steps in metrics.jsonl took."""
    measured = run.times.get("seconds")
    if isinstance(measured, Mapping):
        known = _positive(measured)
        named = {name: sum(known.pop(k, 0.0) for k in keys) for name, keys in PHASES.items()}
        return {k: v for k, v in (named | known).items() if v > 0}
    step, wait = (run.metrics.get(k) for k in ("perf/step_seconds", "data/wait_seconds"))
    if step is None:
        return {}
    # Steps that were not logged took about as long as the logged ones.
    times = max(run.steps, len(step.values)) / len(step.values)
    waited = sum(wait.values) * times if wait is not None else 0.0
    return {"training": max(0.0, sum(step.values) * times - waited), "waiting for data": waited}


def _positive(values: Mapping[Any, Any]) -> dict[str, float]:
    """The seconds of a mapping that are more than nothing."""
    known = {str(k): number(v) for k, v in values.items()}
    return {k: v for k, v in known.items() if v is not None and v > 0}


def total(run: RunData) -> float | None:
    """Seconds that the training took, over all its parts; None where it is not known."""
    parts = phases(run)
    return sum(parts.values()) if parts else None


def bars(parts: Mapping[str, float]) -> str:
    """A bar for each part, and their sum."""
    whole = sum(parts.values()) or 1.0
    rows = [
        f'<tr><th>{escape(name)}</th><td class="bars"><div class="meter">'
        f'<span style="width:{100 * value / whole:.1f}%"></span></div></td>'
        f"<td>{duration(value)}</td><td>{100 * value / whole:.1f} %</td></tr>"
        for name, value in parts.items()
    ]
    rows.append(
        f'<tr class="sum"><th>together</th><td></td><td>{duration(sum(parts.values()))}</td>'
        "<td></td></tr>"
    )
    return (
        '<div class="scroll"><table class="facts shares"><tbody>'
        f"{''.join(rows)}</tbody></table></div>"
    )


def commands(run: RunData) -> str:
    """The commands that were run, each to copy, with their seconds."""
    rows: list[str] = []
    known = [s for c in run.commands if (s := _seconds(c)) is not None]
    longest = max(known, default=0.0) or 1.0
    for entry in run.commands:
        seconds = _seconds(entry)
        width = 100 * (seconds or 0.0) / longest
        command = escape(str(entry.get("command", "")))
        rows.append(
            f'<li><div class="command"><code>{command}</code>'
            '<button type="button">copy</button></div>'
            f'<div class="time"><span style="width:{width:.1f}%"></span></div>'
            f"<b>{duration(seconds) if seconds is not None else '–'}</b></li>"
        )
    if not rows:
        return ""
    said = f"Added up: {duration(sum(known))}." if len(known) > 1 else ""
    seconds = run.results.get("seconds")
    wall = number(seconds.get("total")) if isinstance(seconds, Mapping) else None
    if wall is not None and known:
        beside = " (commands that ran side by side count twice above)"
        said += f" By the clock: {duration(wall)}{beside if wall < sum(known) else ''}."
    note = f"<p class='note'>{said}</p>" if said else ""
    return f'<ol class="commands">{"".join(rows)}</ol>{note}'


def _seconds(entry: Mapping[str, Any]) -> float | None:
    value = number(entry.get("seconds"))
    return value if value is not None and value >= 0 else None
