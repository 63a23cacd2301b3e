"""`mm export`: a run's model for other people's tools."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mm.cli.common import JsonFile, console, existing
from mm.errors import UserError

app = typer.Typer()


class Format(StrEnum):
    hf = "hf"
    peft = "peft"


@app.command(help="Write the model of RUN so that transformers and what builds on it load it.")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a saved model.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")],
    format: Annotated[
        Format,
        typer.Option(
            "--format", help="hf: the whole model in Hugging Face's layout; peft: its adapters."
        ),
    ] = Format.hf,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="peft: the folder in Hugging Face's layout that the adapters are for; logits are "
            "compared on it.",
        ),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Compare no logits with transformers.")
    ] = False,
    json: JsonFile = None,
) -> None:
    existing(run, "run folder", "make one with: mm train CONFIG")
    shared = importlib.import_module("mm.cli.import")  # no name that `import x` could spell
    shared.refuse_existing(out)
    from mm.interchange.check import require_peer, require_peft

    if format is Format.peft:
        from mm.interchange.adapter import export_adapter

        if base is not None:
            existing(base, "folder", "name the one that was imported")
            if not no_check:
                require_peft()
        shared.say(export_adapter(run, out, base=base, check=not no_check), out, json)
        console().print(f"load it: PeftModel.from_pretrained(model, '{out}')")
        return
    if base is not None:
        raise UserError("--base is of --format peft; the whole model needs none")
    from mm.interchange.write import export_model

    if not no_check:
        require_peer()
    shared.say(export_model(run, out, check=not no_check), out, json)
    auto = auto_class(out)
    console().print(f"load it: {auto}.from_pretrained('{out}')")


def auto_class(out: Path) -> str:
    """Class of `transformers` that loads an exported folder."""
    from mm.interchange.read import family_of, read_settings

    return family_of(read_settings(out)).auto
