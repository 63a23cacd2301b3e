"""`mm run`: every command of a folder that `mm init` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm.cli.common import JsonFile, console, existing, write_json

app = typer.Typer()


@app.command(
    help="Run the commands of DIR/run.sh in order, each echoed.\n\nThe same command again goes on "
    "where it stopped and skips what is done."
)
def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `mm init` wrote.")],
    json: JsonFile = None,
) -> None:
    existing(folder, "folder", f"make it with: mm init SRC --out {folder}")
    from mm.own_data.run import read_json
    from mm.own_data.run import run as run_all

    home = run_all(folder)
    write_json(json, {"run": home, "commands": read_json(home / "commands.json")})
    console().print(f"done; open {home / 'report' / 'index.html'}, or: mm generate {home} --help")
