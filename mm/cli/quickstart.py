"""`mm quickstart`: data, tokenizers, backbone, evaluation and report, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm.cli.common import JsonFile, write_json

app = typer.Typer()


@app.command(
    help="From nothing to a trained, evaluated any-to-any model and its report: digits as scans, "
    "speech and captions.\n\n"
    "No GPU, no account, no download; the same command again goes on where it stopped."
)
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Run folder.")] = Path(
        "runs/quickstart"
    ),
    config: Annotated[
        str,
        typer.Option(
            metavar="CONFIG",
            help="Backbone YAML; configs/quickstart/backbone.yaml is attention only.",
        ),
    ] = "configs/quickstart/hybrid.yaml",
    seed: Annotated[
        int, typer.Option(min=0, help="Of all trainings; the data split does not depend on it.")
    ] = 0,
    scale: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=100.0,
            help="Share of every training budget; below 1 the figures mean little.",
        ),
    ] = 1.0,
    json: JsonFile = None,
) -> None:
    from mm.quickstart import main

    write_json(json, main.quickstart(out, config=config, seed=seed, scale=scale))
