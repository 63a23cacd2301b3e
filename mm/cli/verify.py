"""`mm verify`: a few steps of a config, as it is set, against one process in fp32."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mm.cli.common import (
    PASS_OVERRIDES,
    JsonFile,
    Overrides,
    existing_config,
    overrides,
    run_config,
    table,
    write_json,
)
from mm.errors import UserError
from mm.processes import unwind_on_sigterm

app = typer.Typer()


@app.command(
    help="Compare a few steps of CONFIG, in N processes, with one process in fp32 without "
    "recomputation and with reference kernels, from the same weights and the same data: rows, "
    "losses, the gradient of every parameter, updates, a save and a resume.\n\nNothing is written "
    "to the run's folder. Exit code 2 where anything differs by more than rounding.",
    context_settings=PASS_OVERRIDES,
)
def verify(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Run YAML, as for mm train (or a run folder).")
    ],
    changes: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            max=1024,
            help="Processes on this machine; 2 when nothing is said. Under a launcher (torchrun, "
            "srun, mm launch KIND CONFIG --verify): those that it started.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, max=1000, help="Optimizer steps.")] = 4,
    json: JsonFile = None,
) -> None:
    assignments = overrides(changes)
    path = run_config(Path(config)) if Path(config).is_dir() else existing_config(config)
    from mm.run import Run
    from mm.verify.group import join
    from mm.verify.verify import train_rank
    from mm.verify.verify import verify as compare

    begun = time.monotonic()
    run = Run.load(path, assignments)
    group = join(processes, train_rank)
    if group is not None and group.rank > 0:
        with unwind_on_sigterm():
            raise typer.Exit(group.follow())
    processes = group.world if group is not None else processes or 2
    code = 2
    try:
        with Console(stderr=True).status("starting") as status:
            found = compare(run, processes, steps, status.update, str(path), group)
        code = 0 if found["agrees"] else 2
    finally:
        if group is not None:
            group.end(code)
    found["seconds"] = round(time.monotonic() - begun, 1)
    title = (
        f"{config}: {processes} process{'es' * (processes > 1)}, ZeRO stage {found['zero_stage']}, "
        f"{found['precision']}, {found['device']}; {found['steps']} steps, "
        f"{found['seconds']:.0f} s"
    )
    rows = [
        (c["name"], c["found"], c["allowed"], "agrees" if c["agrees"] else "DIFFERS")
        for c in found["checks"]
    ]
    table(title, ("check", "found", "allowed", "verdict"), rows, left=4)
    write_json(json, found)
    if not found["agrees"]:
        first = next(c for c in found["checks"] if not c["agrees"])
        raise UserError(
            f"{config}: {first['name']}: {first['found']} (allowed: {first['allowed']}); find what "
            "does it, one key at a time: engine.precision=fp32, engine.zero_stage=0, --processes 1"
        )
