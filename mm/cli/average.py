"""`mm average`: several checkpoints of a run, or several saved models, as one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from mm.cli.common import JsonFile, console, existing, write_json
from mm.errors import UserError

app = typer.Typer()


@app.command(help="Write the average of runs, saved models or checkpoints as a saved model.")
def average(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...", help="Oldest first: RUN, a saved model, RUN/checkpoints/step_N."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write.")],
    decay: Annotated[
        float | None,
        typer.Option(
            "--decay", min=0, max=1, help="A moving average with this share of the old; else equal."
        ),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option("--share", min=0, help="Share of a source, once for each, over their sum."),
    ] = None,
    json: JsonFile = None,
) -> None:
    for source in sources:
        existing(source, "source", "name a run, a saved model, or a folder of RUN/checkpoints")
    importlib.import_module("mm.cli.import").refuse_existing(out)
    from mm.trainer.average import average_models, average_weights

    if share and (decay is not None or len(share) != len(sources) or sum(share) <= 0):
        raise UserError("--share: give one for each source, some above 0, and no --decay")
    shares = [s / sum(share) for s in share] if share else average_weights(len(sources), decay)
    average_models(sources, out, shares)
    told = ", ".join(f"{s:.3g} of {p}" for s, p in zip(shares, sources, strict=True))
    console().print(f"wrote {out}: {told}")
    write_json(
        json, {"out": out, "shares": {str(p): s for s, p in zip(shares, sources, strict=True)}}
    )
