"""`mm sweep`: the same run with other settings, here or as a sweep of Weights & Biases."""

from __future__ import annotations

import json as json_
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli.common import (
    PASS_OVERRIDES,
    JsonFile,
    Overrides,
    console,
    existing_config,
    number,
    overrides,
    table,
    write_json,
)
from mm.errors import UserError
from mm.reading import parse_yaml
from mm.sweep import Sweep, read_result

app = typer.Typer()


@app.command(
    help="Train CONFIG once for every setting of SWEEP, a YAML as W&B has it: method (grid or "
    "random), metric, parameters. Without an account it runs here, into one table.\n\nThe same "
    "command again goes on where it stopped.",
    context_settings=PASS_OVERRIDES,
)
def sweep(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Run YAML.")],
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML of the sweep.")],
    changes: Overrides = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Trials; default: all of a grid, 10 of random.")
    ] = None,
    server: Annotated[
        bool, typer.Option("--wandb/--local", help="Let Weights & Biases choose the settings.")
    ] = False,
    json: JsonFile = None,
) -> None:
    from mm.run import Run

    path = existing_config(config)
    fixed = overrides(changes)
    if not file.is_file():
        raise UserError(f"{file}: no such file; docs/monitoring.md has a sweep to copy")
    try:
        given = parse_yaml(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from error
    plan = Sweep.of(given, str(file), file.stem)
    base = Run.load(path, fixed)
    if server:
        _on_server(plan, base, path, fixed, count)
        return
    done = []
    for i, values in enumerate(plan.trials(count)):
        name = f"{base.name}-{file.stem}-{i:03d}"
        result = read_result(base.out / name, plan, values)
        if result is None:
            console().print(f"trial {i}: {_told(values)}")
            _train(path, fixed, name, values, base, file.stem)
            result = read_result(base.out / name, plan, values)
        done.append({"trial": name, **values, plan.metric: result})
        plan.write_table(base.out / f"{base.name}-{file.stem}.jsonl", done)
    ranked = plan.rank(done)
    columns = ("trial", *plan.parameters, plan.metric)
    rows = [[number(row.get(c)) for c in columns] for row in ranked]
    table(f"{file}: best first", columns, rows)
    write_json(json, ranked)


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in values.items())


def _train(
    path: str, fixed: list[str], name: str, values: Mapping[str, Any], base: Any, group: str
) -> None:
    """Train one trial in a process of its own, so that none inherits from the one before."""
    words = [*fixed, f"name={name}"]
    if base.tracking.group is None:
        words.append(f"tracking.group={base.name}-{group}")
    words += [f"{key}={json_.dumps(value)}" for key, value in values.items()]
    ended = subprocess.run([sys.executable, "-m", "mm", "train", path, *words])
    if ended.returncode in (75, 130, -2):
        raise SystemExit(75)  # a signal: the same command goes on
    if ended.returncode:
        console().print(f"{name} failed with code {ended.returncode}: it counts as the worst")


def _on_server(plan: Sweep, base: Any, path: str, fixed: list[str], count: int | None) -> None:
    from mm.trainer.log.sinks.wandb_sink import has_key, run_sweep

    if not has_key():
        raise UserError("a sweep of W&B needs an account: wandb login, or leave --wandb out")

    def trial(values: Mapping[str, Any]) -> None:
        name = f"{base.name}-{plan.name}-{abs(hash(tuple(sorted(values.items())))) % 10**8:08d}"
        _train(path, fixed, name, values, base, plan.name)

    console().print(f"sweep {run_sweep(plan.definition, base.tracking, trial, count)} is done")
