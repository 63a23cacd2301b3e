"""`mm report`: write the self-contained HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm.cli.common import JsonFile, console, existing, write_json

app = typer.Typer()


@app.command(
    help="Write RUN/report/index.html: one self-contained page of curves, samples, audio and "
    "figures."
)
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    json: JsonFile = None,
) -> None:
    existing(run, "run folder", "make one with: mm train CONFIG")
    from mm.report.build import build_report

    page = build_report(run)
    console().print(f"wrote {page} ({page.stat().st_size / 1024:.0f} kB); open it in any browser")
    write_json(json, {"report": page, "bytes": page.stat().st_size})
