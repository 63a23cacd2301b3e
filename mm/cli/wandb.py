"""`mm wandb`: a saved view of a project, made at once."""

from __future__ import annotations

from typing import Annotated

import typer

from mm.cli.common import console, existing_config
from mm.errors import UserError

app = typer.Typer(help="A view of a project of Weights & Biases.", no_args_is_help=True)


@app.command(
    help="Save a view with the panels in the order in which one looks: is it sick, who is it, "
    "where is the time, what does it make. CONFIG says project and entity."
)
def workspace(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Run YAML, or a run folder's.")],
    entity: Annotated[str | None, typer.Option(help="User or team; default: the config's.")] = None,
    name: Annotated[str, typer.Option(help="Name of the view.")] = "mm",
) -> None:
    from mm.run import Run
    from mm.trainer.log.workspace import make_workspace

    tracking = Run.load(existing_config(config)).tracking
    where = entity or tracking.entity
    if where is None:
        raise UserError("a view belongs to somebody: --entity NAME, or set tracking.entity")
    made = make_workspace(where, tracking.project, name)
    made.save()
    console().print(f"saved: {made.url}")


@app.command(help="Print the panels of the view, section by section.")
def panels() -> None:
    from mm.trainer.log.workspace import SECTIONS

    for title, found in SECTIONS.items():
        console().print(title, style="bold")
        for panel, keys in found:
            console().print(f"  {panel}: {', '.join(keys)}")
