"""The headline figures as cards, each beside its bar and chance level, and what was mixed up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from mm.report import confusion
from mm.report.folder import number
from mm.report.read import RunData
from mm.report.words import amount, pretty

LOWER_IS_BETTER = re.compile(r"distance|bits_per|perplexity|loss|error|nats|fertility|wer\b")
PREFIX = "eval/"
MARKS = {
    "chance": "chance",
    "bar": "bar to reach",
    "judge": "judge on real data",
    "probe": "logistic regression on pixels",
}


def figures(run: RunData) -> str:
    """Cards of results.json, else of the newest evaluation in metrics.jsonl; then mix-ups."""
    cards = [_card(row) for row in rows(run)]
    tables = [confusion.heat_map(pretty(name), *table) for name, table in confusions(run).items()]
    tables = [table for table in tables if table]
    body = ""
    if cards:
        shown = {m: says for m, says in MARKS.items() if any(f'<i class="{m}"' in c for c in cards)}
        legend = "".join(f'<li><i class="{m}"></i>{says}</li>' for m, says in shown.items())
        legend = f'<ul class="legend marks">{legend}</ul>' if legend else ""
        body = f'<div class="cards">{"".join(cards)}</div>{legend}'
    if tables:
        body += (
            "<h3>Confusion <small>rows: the true class, columns: the answer; darker: a larger "
            f'share of the row</small></h3><div class="confusions">{"".join(tables)}</div>'
        )
    return body


def by_task(run: RunData) -> dict[str, dict[str, Any]]:
    """Task -> its newest figures, from the rows ``eval/<task>/<figure>`` of metrics.jsonl."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in run.last_line.items():
        task, slash, figure = key.removeprefix(PREFIX).rpartition("/")
        if key.startswith(PREFIX) and slash:
            found.setdefault(task, {})[figure] = value
    return found


def rows(run: RunData) -> list[dict[str, Any]]:
    """Figures with unit, n and what stands beside them; ``task`` where two have one name."""
    from mm.cli.eval import figure_rows

    given = run.results.get("figures")
    found = [dict(r) for r in given if _is_row(r)] if isinstance(given, list) else []
    if not found:
        for task, values in by_task(run).items():
            found += [{**row, "task": task} for row in figure_rows(values)]
    for row in found:  # mm eval writes <task>/<figure> where two tasks give one figure
        task, slash, name = row["name"].rpartition("/")
        row |= {"name": name, "task": task} if slash else {}
    times = Counter(row["name"] for row in found)
    return [{**row, "task": row.get("task") if times[row["name"]] > 1 else None} for row in found]


def _is_row(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("name"), str)


def confusions(run: RunData) -> dict[str, tuple[Any, Any]]:
    """Title -> (counts, classes) of every task that has a confusion matrix."""
    found: dict[str, tuple[Any, Any]] = {}
    for task, values in _tasks(run):
        for key, counts in values.items():
            stem = key.removesuffix("_confusion")
            if stem != key and f"{stem}_classes" in values:
                title = stem if stem not in found else f"{stem} · {task}"
                found[title] = (counts, values[f"{stem}_classes"])
    return found


def _tasks(run: RunData) -> Iterator[tuple[str, Mapping[str, Any]]]:
    tasks = run.results.get("tasks")
    for each in tasks if isinstance(tasks, list) else ():
        inner = each.get("figures") if isinstance(each, Mapping) else None
        if isinstance(inner, Mapping):
            task = each.get("task")
            data = task.get("data") if isinstance(task, Mapping) else ""
            yield str(each.get("name") or data or ""), inner
    if not run.results:
        yield from by_task(run).items()


def _card(row: Mapping[str, Any]) -> str:
    unit = str(row.get("unit") or "")
    value = number(row.get("value"))
    beside = {kind: number(row.get(kind)) for kind in MARKS}
    bar, chance = beside["bar"], beside["chance"]
    lower = bool(LOWER_IS_BETTER.search(row["name"]))
    if "better" in row or "lower_is_better" in row:
        lower = row.get("better") == "lower" or row.get("lower_is_better") is True
    sign = "≤" if lower else "≥"
    chip = ""
    if value is not None and bar is not None:
        met = value <= bar if lower else value >= bar
        said = "bar met" if met else "above the bar" if lower else "below the bar"
        chip = f'<span class="chip {"met" if met else "missed"}">{said}</span>'
    elif value is not None and chance is not None and (value > chance if lower else value < chance):
        chip = '<span class="chip missed">worse than chance</span>'
    notes = []
    if bar is not None:
        notes.append(f"bar {sign} {amount(bar, unit)}")
    for kind in ("chance", "judge", "probe"):
        if beside[kind] is not None:
            notes.append(f"{MARKS[kind]} {amount(beside[kind], unit)}")
    if isinstance(row.get("n"), int):
        notes.append(f"n = {row['n']:,}")
    meter = ""
    if unit == "share" and value is not None:
        marks = "".join(
            f'<i class="{kind}" style="left:{100 * min(1, max(0, mark)):.1f}%" title="{says}"></i>'
            for kind, says in MARKS.items()
            if (mark := beside[kind]) is not None
        )
        meter = (
            '<div class="meter"><span '
            f'style="width:{100 * min(1, max(0, value)):.1f}%"></span>{marks}</div>'
        )
    task = f" <small>{escape(str(row['task']))}</small>" if row.get("task") else ""
    figure, word = amount(value, unit), ""
    if unit != "share":
        figure, _, word = figure.partition(" ")
    word = f" <small>{escape(word)}</small>" if word else ""
    return (
        f'<div class="card"><h3>{escape(pretty(row["name"]))}{task}</h3><p '
        f'class="value"><span>{escape(figure)}{word}</span>{chip}</p>'
        f'{meter}<p class="note">{escape(" · ".join(notes))}</p></div>'
    )
