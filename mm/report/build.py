"""`build_report`: one self-contained HTML page of a run folder.

Nothing in it is fetched from anywhere.
"""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.report import sections
from mm.report.charts import short
from mm.report.data import data
from mm.report.read import RunData, read_run

HERE = Path(__file__).parent
# The page may load nothing: a browser refuses what a sample or a config tries to smuggle in.
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'"
)

SECTIONS = (
    ("figures", "Results on the held-out split", sections.figures),
    ("samples", "Samples over time", sections.samples),
    ("curves", "Training", sections.curves),
    ("data", "Data", data),
    ("tokenizers", "Tokenizers", sections.tokenizers),
    ("sampling", "Sampling and time", sections.sampling),
    ("commands", "Commands", sections.commands),
    ("environment", "Environment", sections.environment),
    ("config", "Config", sections.config),
)


def build_report(run_folder: str | Path) -> Path:
    """Write ``<run_folder>/report/index.html`` and return its path.

    The page holds its own styles, script, pictures and audio. What a run lacks is left out; what
    cannot be read is named.

    Raises:
        UserError: the folder is missing or holds nothing that a run writes.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; make one with: mm train CONFIG")
    run = read_run(folder)
    if not (
        run.metrics
        or run.results
        or run.config_text
        or run.tokenizers
        or run.samples
        or run.evaluation
    ):
        raise UserError(
            f"{folder}: holds no config.yaml, metrics.jsonl or results.json, so not a run; "
            "make one with: mm train CONFIG"
        )
    page = folder / "report" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    part = page.with_name("index.html.part")
    part.write_text(render(run), encoding="utf-8")
    part.replace(page)
    return page


def render(run: RunData) -> str:
    """Return the whole page of ``run``."""
    bodies = [(key, title, section(run)) for key, title, section in SECTIONS]
    shown = [(key, title, body) for key, title, body in bodies if body]
    nav = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in shown)
    main = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>'
        for key, title, body in shown
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    notes = (
        f'<section id="notes"><h2>Could not be read</h2><ul>{notes}</ul></section>' if notes else ""
    )
    style = (HERE / "style.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta '
        f'http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta '
        'name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(run.name)} · mm '
        f"report</title><style>{style}</style></head><body>"
        "<header><p class='kicker'>mm run "
        f"report</p><h1>{escape(run.name)}</h1>{_chips(run)}</header>"
        f"<nav>{nav}</nav><main>{main}{notes}</main>"
        f"<footer>SlotWrites {time.strftime('%Y-%m-%d %H:%M')} by mm report "
        f"{escape(str(run.folder))}</footer>"
        f"<script>{script}</script></body></html>"
    )


def _chips(run: RunData) -> str:
    """What the run is, in a line: model, size, steps, tokens, modalities, time."""
    model = run.config.get("model")
    model = model if isinstance(model, dict) else {"kind": model}
    inner = model.get("backbone")
    backbone: dict[str, Any] = inner if isinstance(inner, dict) else {}
    facts: list[tuple[str, Any]] = [
        ("model", model.get("kind")),
        ("pattern", model.get("pattern") or backbone.get("pattern")),
        ("depth", model.get("depth") or backbone.get("depth")),
        ("width", model.get("d_model") or model.get("d") or backbone.get("d_model")),
        ("parameters", _first(run, "parameters", "n_parameters", "params")),
        ("steps", f"{run.steps:,}" if run.steps else None),
        ("modalities", ", ".join(_modalities(run)) or None),
        ("precision", _first(run, "precision")),
        ("ZeRO stage", _nested(run.config, "engine", "zero_stage")),
        ("seed", run.config.get("seed")),
        ("training time", _duration(run)),
    ]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_brief(v))}</dd></div>"
        for name, v in facts
        if v is not None
    )
    return f'<dl class="chips">{items}</dl>' if items else ""


def _brief(value: Any) -> str:
    return short(float(value)) if isinstance(value, (int, float)) and value > 9999 else str(value)


def _first(run: RunData, *names: str) -> Any:
    """The first of ``names`` that the environment, the results or the last metrics line knows."""
    for place in (run.environment, run.results, run.last_line):
        for name in names:
            for key, value in place.items():
                if key.split("/")[-1] == name and isinstance(value, (int, float, str)):
                    return value
    return None


def _nested(values: dict[str, Any], *keys: str) -> Any:
    node: Any = values
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _modalities(run: RunData) -> list[str]:
    shares = [
        n.removeprefix("tokens/").removesuffix("_share")
        for n in run.metrics
        if n.startswith("tokens/") and n.endswith("_share")
    ]
    return shares or list(run.tokenizers)


def _duration(run: RunData) -> str | None:
    series = run.metrics.get("perf/step_seconds")
    if series is None:
        return None
    # Steps that were not logged took about as long as the logged ones.
    total = sum(series.values) / len(series.values) * max(run.steps, len(series.values))
    return f"{total / 60:.1f} min" if total >= 60 else f"{total:.0f} s"
