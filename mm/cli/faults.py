"""`mm faults`: break a small run in every way a CPU allows and say what was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli.common import JsonFile, console, table, write_json

app = typer.Typer()


@app.command(
    help="Inject faults into a small run and say what each one cost.\n\nKills, signals, full and "
    "read-only disks, damaged files, dead and hanging ranks, NaN, bombs, hostile pickles. "
    "Exit code 1 when one is not survived. All tries take about an hour on 2 CPU cores, --quick "
    "some minutes."
)
def faults(
    quick: Annotated[bool, typer.Option("--quick", help="One or two tries of each.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="WORDS", help="Only faults whose name holds this."),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="FILE", help="Also write the table as Markdown."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Leave out the faults that the --json FILE has rows of."),
    ] = False,
    json: JsonFile = None,
) -> None:
    from mm.faults.run import beside, inject, markdown, read

    def report(rows: list[dict[str, Any]]) -> None:  # after each fault: an hour may be cut short
        row = rows[-1]
        console().print(
            f"{row['survived']}/{row['tries']} {row['fault']} ({row['seconds']:.0f} s)",
            markup=False,
        )
        write_json(json, rows)

    before = read(json, quick) if resume and json is not None else []
    rows = inject(quick, only or (), report, before)
    columns = ("fault", "tries", "survived", "lost")
    table("mm faults", columns, [[row[c] for c in columns] for row in rows])
    write_json(json, rows)
    if write is not None:
        write.write_text(markdown(rows, quick) + beside(write), encoding="utf-8")
        console().print(f"wrote {write}", markup=False)
    if any(row["survived"] < row["tries"] or not row["tries"] for row in rows):
        raise typer.Exit(1)
