"""`mm train`: run the stages of a Run YAML; the same command again resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli.common import (
    PASS_OVERRIDES,
    JsonFile,
    Overrides,
    console,
    is_main,
    overrides,
    run_config,
    write_json,
)
from mm.cli.eval import figure_table, task_rows
from mm.cli.trained import print_trained
from mm.trainer.health.signals import starting

app = typer.Typer()


@app.command(
    help="Train what CONFIG describes.\n\nRun the same command again to resume. Several processes: "
    "torchrun --nproc_per_node 2 -m mm train CONFIG",
    context_settings=PASS_OVERRIDES,
)
def train(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="Run YAML (or the folder of a run to go on with)."),
    ],
    changes: Overrides = None,
    json: JsonFile = None,
) -> None:
    path = run_config(Path(config)) if Path(config).is_dir() else config
    assignments = overrides(changes)
    with starting():
        from mm.trainer import loop

        result = loop.train(path, assignments)
    if is_main():
        print_trained(f"Trained {config}", result)
        measured: dict[str, dict[str, Any]] = {}
        for key, value in result.items():
            if key.startswith("eval/"):
                _, name, figure = key.split("/", 2)
                measured.setdefault(name, {})[figure] = value
        if rows := task_rows(measured):
            figure_table("Evaluated at the end", rows)
        if folder := result.get("folder"):
            console().print(f"run folder: {folder}; next: mm eval {folder} · mm report {folder}")
    write_json(json, result)
