"""`mm explain`: replay a step of a run and say what was in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli.common import JsonFile, console, existing, number, run_config, table, write_json

app = typer.Typer()

ROWS = 8


@app.command(
    help="Do a step of RUN again, from the checkpoint before it, and say what was in it: samples, "
    "their losses, gradients by layer, and what differs from the steps beside it.\n\nWritten to "
    "RUN/explain/ and shown by mm report. Keep checkpoints with checkpoints.keep_every."
)
def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    step: Annotated[int, typer.Option("--step", min=1, help="Optimizer step, from 1.")],
    json: JsonFile = None,
) -> None:
    existing(run, "run folder", "make one with: mm train CONFIG")
    from mm.run import Run
    from mm.trainer.explain import explain as replay

    told = replay(Run.load(run_config(run)), step)
    same = (
        "bit by bit as it was" if told["same_bits"] else "NOT as it was: it ran on other hardware"
    )
    console().print(
        f"step {step}, replayed from step {told['from_step']}: loss {number(told['loss_now'])}, "
        f"{same} ({number(told['loss_then'])})"
    )
    rows = [
        (cost["key"], number(cost["loss"]), number(cost["targets"]), _modalities(cost))
        for cost in told["samples"][:ROWS]
    ]
    table("samples, worst first", ("sample", "loss", "targets", "by modality"), rows)
    for title, key in (("gradient norm by layer", "gradient"), ("figures", "metrics")):
        changed = [
            (name, number(row["step"]), number(row["beside"]), number(row["ratio"]))
            for name, row in list(told[key].items())[:ROWS]
        ]
        table(f"{title}, greatest change first", ("", "step", "beside it", "ratio"), changed)
    console().print(f"next: mm report {run}")
    write_json(json, told)


def _modalities(cost: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number(v['loss'])}" for name, v in cost["by_modality"].items())
