"""`mm train`: run the stages of a Run YAML; the same command again resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from mm.cli.common import (
    PASS_OVERRIDES,
    JsonFile,
    Overrides,
    TrustCode,
    console,
    existing_config,
    is_main,
    overrides,
    run_config,
    table,
    write_json,
)
from mm.cli.eval import figure_table, task_rows
from mm.cli.trained import print_trained
from mm.trainer.health.signals import starting

app = typer.Typer()

# Keys that are changed most, with the kinds that they are shown of.
USED = (
    "name", "seed", "model.d_model", "model.backbone.pattern", "model.backbone.depth",
    "stages.0.budget.steps", "stages.0.data.batch_size", "stages.0.data.seq_len",
    "stages.0.optimizer.lr", "stages.0.schedule.warmup", "stages.0.eval_every",
    "stages.0.early_stop", "checkpoints.every", "export", "engine.zero_stage",
    "engine.precision", "tracking.mode", "evaluate",
)  # fmt: skip
KINDS = {"network": "lm", "backbone": "stack", "data": "packed", "optimizer": "adamw"}


class TrainCommand(typer.core.TyperCommand):
    """Its help ends with the keys that are changed most, as the configs describe them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # type: ignore[override]
        super().format_help(ctx, formatter)
        from mm.cli.keys import find_key, show

        console().print("Keys that are changed most, as KEY=VALUE:")
        for line in show(find_key(path, KINDS) for path in USED):
            console().print("  ", line, sep="")
        console().print("All of them: mm config keys; some: mm config keys 'stages.*.optimizer*'")


@app.command(
    cls=TrainCommand,
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
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="Trace these steps (10:13: four of them) on the main process: a Chrome trace and "
            "the ten dearest operators, in the run's folder.",
        ),
    ] = None,
    trust_code: TrustCode = False,
    json: JsonFile = None,
) -> None:
    assignments = overrides(changes)
    is_folder = Path(config).is_dir()
    path = run_config(Path(config)) if is_folder else existing_config(config)
    with starting():
        from mm.trainer import loop
        from mm.trainer.callbacks.profile import Profile, parse_steps

        traced = [Profile(*parse_steps(profile), _show_ops)] if profile is not None else []
        # A YAML that was named is the user's own; the config in a folder may be anybody's.
        result = loop.train(path, assignments, traced, trust_code=trust_code or not is_folder)
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


def _show_ops(rows: Sequence[Mapping[str, Any]], trace: str) -> None:
    """Print the dearest operators of the steps that were traced."""
    cells = [(r["op"], r["calls"], r["ms"], f"{r['share']:.1%}") for r in rows]
    table("Dearest operators of these steps, own time", ("op", "calls", "ms", "share"), cells)
    console().print(f"trace, for Perfetto or chrome://tracing: {trace}", markup=False)
