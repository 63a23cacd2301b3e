"""`mm launch`: start a run on this machine or a cluster, and find it again by its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mm.cli.common import (
    PASS_OVERRIDES,
    JsonFile,
    Overrides,
    console,
    existing,
    existing_config,
    overrides,
    run_config,
    table,
    write_json,
)
from mm.cli.preflight import pass_preflight
from mm.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    help="Start a run on this machine or a cluster; find it again by its folder.\n\nThe cluster is "
    "a YAML, configs/cluster/KIND.yaml or --cluster FILE; cluster.KEY=VALUE changes a key of it. "
    "--dry-run prints the files and commands and needs no cluster.",
)

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="Run YAML (or the folder of a run to go on with).")
]
Cluster = Annotated[
    str | None,
    typer.Option("--cluster", metavar="FILE", help="Cluster YAML; default: the shipped one."),
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Machines.")]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus-per-node", min=1, help="Processes a machine: one a GPU."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")
]
Preflight = Annotated[
    bool, typer.Option(" /--no-preflight", help="Start without checking the hosts (mm doctor).")
]
Rehearse = Annotated[
    int | None,
    typer.Option(
        "--rehearse",
        min=1,
        metavar="N",
        help="Only step it a few times as rank 0 of N, on this machine, over a fake process group.",
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Only compare four steps in all processes of the job with one in fp32, as mm verify "
        "does; the logs are in the folder NAME-verify beside the run's.",
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]


def _launch(
    kind: str,
    config: str,
    changes: list[str] | None,
    cluster: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    dry_run: bool,
    preflight: bool,
    json: Path | None,
    rehearse: int | None = None,
    verify: bool = False,
) -> None:
    from mm.launch import start
    from mm.launch.batch import batch_arithmetic
    from mm.run import Run

    words = overrides(changes)
    own = [word.removeprefix("cluster.") for word in words if word.startswith("cluster.")]
    rest = [word for word in words if not word.startswith("cluster.")]
    path = str(run_config(Path(config))) if Path(config).is_dir() else existing_config(config)
    run = Run.load(path, rest)  # a config that is wrong is refused before anything is started
    launcher = start.cluster(kind, cluster, own, nodes, gpus_per_node)
    if not preflight:
        launcher = launcher.model_copy(update={"preflight": False})
    job = start.job(run, path, rest, launcher.forward, Path.cwd())
    if verify:
        folder = job.folder.with_name(f"{run.name}-verify")
        job = job._replace(command="verify", folder=folder)
        # what it finds is no failure to start again after, and it has no steps to watch
        launcher = launcher.model_copy(update={"restarts": 0, "hang_s": 0.0})
    if rehearse is not None:
        _rehearse(run, job, launcher, rehearse, dry_run, json)
        return
    plan = launcher.plan(job)
    arithmetic = batch_arithmetic(run, plan.world)
    if dry_run:
        from mm.launch import predict

        memory = predict.memory(job, launcher, plan, len(run.stages))
        _show(kind, job, plan, launcher, [*arithmetic, *_memory_lines(memory)])
        write_json(json, start.as_values(kind, job, plan, arithmetic, memory))
        return
    if launcher.preflight and len(launcher.endpoints()) > 1:
        pass_preflight(launcher, job)
    out = console()
    outcome = start.start(
        kind, launcher, run, job, plan, lambda line: out.print(line, markup=False, soft_wrap=True)
    )
    write_json(json, {"code": outcome.code, "why": outcome.why, "folder": job.folder})
    if outcome.code:
        typer.echo(f"mm: {outcome.why}", err=True)
        raise typer.Exit(outcome.code)
    if outcome.why:
        out.print(outcome.why, markup=False)


def _rehearse(
    run: Any, job: Any, launcher: Any, processes: int, dry_run: bool, json: Path | None
) -> None:
    """Step a job as rank 0 of ``processes``. Raises UserError."""
    from mm.cli import rehearse as page
    from mm.launch import rehearse
    from mm.launch.batch import batch_arithmetic

    if dry_run:
        raise UserError("--rehearse and --dry-run: say one of them")
    arithmetic = batch_arithmetic(run, processes)
    found = rehearse.rehearse(job, processes, min(processes, launcher.gpus_per_node or 1))
    page.show(run.name, found)
    for line in (*arithmetic, f"nothing was written below {job.folder.parent} (--rehearse)"):
        console().print(line, markup=False)
    write_json(json, {**found, "batch": arithmetic})


def _memory_lines(memory: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a stage: memory of one GPU by part, or why it is not known."""
    from mm.cli.plan import size

    out = []
    for i, found in enumerate(memory):
        if "why" in found:
            out.append(f"stages.{i}: memory per GPU: not predicted: {found['why']}")
            continue
        by_part = "memory.by_part."
        held = {k.removeprefix(by_part): v for k, v in found.items() if k.startswith(by_part)}
        parts = [f"{part} {size(n)}" for part, n in held.items() if n]
        out.append(
            f"stages.{i}: memory per GPU: {size(found['memory.total_bytes'])} of tensors "
            f"({', '.join(parts)}) and {size(found['memory.reserve_bytes'])} of the allocator, of "
            f"{size(found['memory.device_bytes'])}: {'fits' if found['fits'] else 'DOES NOT FIT'} "
            f"(predicted for {found['gpu.name']} by mm plan; evaluation and compilation are not in "
            "it)"
        )
    return out


def _show(kind: str, job: Any, plan: Any, launcher: Any, arithmetic: list[str]) -> None:
    from mm.launch import forward, start

    out = console()
    for name, text in plan.files.items():
        out.print(f"[bold]file {escape(str(job.home / name))}[/bold]")
        out.print(text, markup=False)
    out.print("[bold]commands[/bold]")
    for line in start.command_lines(job, plan):
        out.print(f"  {line}", markup=False)
    variables = forward.mask_secrets(dict(job.environ) | launcher.env)
    table("forwarded environment", ("name", "value"), variables.items(), left=2)
    for line in (*plan.notes, *arithmetic):
        out.print(line, markup=False)
    out.print(f"run folder: {job.folder}; nothing was started (--dry-run)", markup=False)


def _command(kind: str, about: str) -> None:
    @app.command(kind, help=about, context_settings=PASS_OVERRIDES)
    def command(
        config: Config,
        changes: Overrides = None,
        cluster: Cluster = None,
        nodes: Nodes = None,
        gpus_per_node: Gpus = None,
        dry_run: DryRun = False,
        rehearse: Rehearse = None,
        verify: Verify = False,
        preflight: Preflight = True,
        json: JsonFile = None,
    ) -> None:
        given = (config, changes, cluster, nodes, gpus_per_node, dry_run, preflight, json)
        _launch(kind, *given, rehearse, verify)


GOES_ON = "Ctrl-C saves a checkpoint and ends; the same command goes on."


_command("local", f"Train on this machine: torchrun, a free port, a log file a rank.\n\n{GOES_ON}")
_command("ssh", f"Train on the machines of a hostfile, over ssh.\n\n{GOES_ON}")
_command("mpi", f"Train by Open MPI's mpirun, here or on the machines of a hostfile.\n\n{GOES_ON}")
_command(
    "slurm",
    "Hand an sbatch file to Slurm: it saves before its limit, requeues itself and resumes.\n\n"
    "cluster.interactive=true: on this console, now, over salloc and srun.",
)
_command(
    "k8s",
    "Hand a job to Kubernetes with kubectl.\n\ncluster.resource=job, pytorchjob or trainjob.",
)


@app.command(help="Say what was launched into RUN and how it is going.")
def status(folder: Folder, json: JsonFile = None) -> None:
    from mm.launch import control

    values = control.status(existing(folder, "run folder", "start one with: mm launch"))
    rows = [(key, value) for key, value in values.items() if key != "ranks"]
    table(f"{folder}", ("", ""), rows, left=2)
    columns = ("rank", "host", "step", "phase", "since")
    if values["ranks"]:
        table("ranks", columns, [[rank[c] for c in columns] for rank in values["ranks"]], left=2)
    write_json(json, values)


@app.command(help="Print the last lines of every rank's log of RUN.")
def logs(
    folder: Folder,
    lines: Annotated[int, typer.Option("--lines", min=1, help="Of each rank.")] = 20,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Of this rank only.")] = None,
) -> None:
    from mm.launch import control

    existing(folder, "run folder", "start one with: mm launch")
    for line in control.logs(folder, lines, rank):
        console().print(line, markup=False)


@app.command(help="Save a checkpoint and end what was launched into RUN.")
def stop(
    folder: Folder,
    now: Annotated[bool, typer.Option("--now", help="Without a checkpoint.")] = False,
) -> None:
    from mm.launch import control

    existing(folder, "run folder", "start one with: mm launch")
    os.environ.setdefault("LC_ALL", "C")
    console().print(control.stop(folder, now), markup=False)
