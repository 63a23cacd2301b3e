"""`mm bench mup`: the coordinate check of muP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm.cli.common import JsonFile, console, is_main, table, write_json
from mm.errors import UserError


def mup(
    widths: Annotated[
        str, typer.Option(metavar="D,D,...", help="Multiples of 32; the smallest is the base.")
    ] = "64,128,256,512",
    lr: Annotated[float, typer.Option(min=0, help="Learning rate, for all widths.")] = 3e-3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 4,
    optimizer: Annotated[str, typer.Option(metavar="KIND", help="One with muP rates.")] = "adamw",
    json: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the changes over the width.", dir_okay=False),
    ] = None,
) -> None:
    """Measure how far activations move in the first steps over the width: under muP equally far."""
    from mm.bench import mup as measure
    from mm.registry import OPTIMIZERS

    fit = [kind for kind in OPTIMIZERS if getattr(OPTIMIZERS.get(kind), "mup", False)]
    if optimizer not in fit:
        raise UserError(f"--optimizer {optimizer}: muP rates exist for {', '.join(fit)}")
    try:
        wanted = sorted({int(word) for word in widths.split(",")})
    except ValueError:
        wanted = []
    if len(wanted) < 2 or any(width < 1 or width % measure.HEAD_DIM for width in wanted):
        raise UserError(f"--widths {widths}: two or more multiples of {measure.HEAD_DIM}")
    rows = measure.check(wanted, lr=lr, steps=steps, optimizer=optimizer)
    write_json(json, [row._asdict() for row in rows])
    lines = []
    for kind in ("mup", "standard"):
        mine = [row for row in rows if row.parametrisation == kind]
        for place, slope in measure.slopes(mine).items():
            last = {r.width: r.change for r in mine if r.place == place and r.step == steps}
            lines.append((kind, place, *(f"{last[w]:.3g}" for w in wanted), f"{slope:+.2f}"))
    title = f"mean |change| of activations after {steps} steps of {optimizer} at rate {lr:g}"
    table(title, ("", "place", *map(str, wanted), "power of width"), lines)
    if plot is not None and is_main():
        measure.plot(rows, plot)
        console().print(f"wrote {plot}")
