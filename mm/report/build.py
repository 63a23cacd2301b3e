"""`build_report`: one self-contained HTML page of a run folder.

Nothing in it is fetched from anywhere.
"""

from __future__ import annotations

import time
from html import escape
from pathlib import Path

from mm.errors import UserError
from mm.report.begun import begun
from mm.report.comparison import comparison
from mm.report.curves import curves
from mm.report.data import data
from mm.report.explained import explanations
from mm.report.figures import figures
from mm.report.header import chips
from mm.report.lineage import lineage
from mm.report.read import RunData, read_run
from mm.report.samples import samples
from mm.report.starts import starts
from mm.report.times import commands, times
from mm.report.tokenizers import tokenizers
from mm.report.words import facts

HERE = Path(__file__).parent
# The page may load nothing: a browser refuses what a sample or a config tries to smuggle in.
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'"
)

MAX_CONFIG = 200_000  # letters of a config that a page shows


def environment(run: RunData) -> str:
    return facts(run.environment)


def config(run: RunData) -> str:
    if not run.config_text.strip():
        return ""
    lines, text = run.config_text.count("\n"), run.config_text[:MAX_CONFIG]
    return (
        f"<details><summary>config.yaml, {lines} lines</summary><pre>{escape(text)}</pre></details>"
    )


SECTIONS = (
    ("comparison", "Before and after", comparison),
    ("figures", "Results on the held-out split", figures),
    ("samples", "Samples over time", samples),
    ("curves", "Training", curves),
    ("explained", "Why did it spike", explanations),
    ("data", "Data", data),
    ("tokenizers", "Tokenizers", tokenizers),
    ("begun", "Began with", begun),
    ("lineage", "Made from", lineage),
    ("starts", "Starts and failures", starts),
    ("time", "Time", times),
    ("commands", "Commands", commands),
    ("environment", "Environment", environment),
    ("config", "Config", config),
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
        or run.start
        or run.evaluation
    ):
        raise UserError(
            f"{folder}: holds no config.yaml, metrics.jsonl or results.json, so not a run; "
            "make one with: mm train CONFIG"
        )
    page = folder / "report" / "index.html"
    try:
        page.parent.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise UserError(
            f"{page.parent} is no folder; move it away: mv {page.parent} {page.parent}.old"
        ) from error
    if page.parent.is_symlink():
        raise UserError(f"{page.parent} is a link; remove it: rm {page.parent}")
    part = page.with_name("index.html.part")
    part.unlink(missing_ok=True)  # a link there would be written through
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
        f"report</p><h1>{escape(run.name)}</h1>{chips(run)}</header>"
        f"<nav>{nav}</nav><main>{main}{notes}</main>"
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')} by mm report "
        f"{escape(str(run.folder))}</footer>"
        f"<script>{script}</script></body></html>"
    )
