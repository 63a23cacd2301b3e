"""From a cluster YAML and a run to a job that is started, watched or handed over."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm import config as configs
from mm.errors import UserError
from mm.launch import forward, record, restarts, supervise
from mm.launch.launcher import Job, Launcher, Plan, quote
from mm.launch.preflight import drive
from mm.launch.supervise import Outcome
from mm.processes import is_alive
from mm.registry import LAUNCHERS
from mm.run import Run


def cluster(
    kind: str,
    file: str | None,
    changes: Sequence[str],
    nodes: int | None = None,
    gpus_per_node: int | None = None,
) -> Launcher:
    """Read a cluster YAML; ``changes`` are ``key=value``. Raises UserError."""
    origin = file or f"configs/cluster/{kind}"
    values = configs.override(configs.read(origin), changes)
    if values.get("kind") != kind:
        raise UserError(
            f"{origin}: kind is '{values.get('kind')}', not '{kind}'; say: mm launch "
            f"{values.get('kind')}"
        )
    values |= {k: v for k, v in {"nodes": nodes, "gpus_per_node": gpus_per_node}.items() if v}
    launcher = configs.validate(LAUNCHERS.get(kind), values, origin)
    assert isinstance(launcher, Launcher)
    return launcher


def job(run: Run, path: str, changes: Sequence[str], prefixes: Sequence[str], workdir: Path) -> Job:
    """What is trained, seen from the nodes: a file of this machine gets its whole path."""
    file = configs.find(path)
    named = str(file.resolve()) if Path(path).exists() else path
    environ = _environ(prefixes)
    folder = run.folder if run.folder.is_absolute() else workdir / run.folder
    return Job(named, tuple(changes), run.name, folder, environ, workdir)


def preflight(launcher: Launcher, job: Job | None) -> drive.Report:
    """Check the hosts of a cluster before a job, or without one. Raises UserError."""
    endpoints = launcher.endpoints()
    address, port = launcher.meeting_point()
    workdir = launcher.workdir or Path.cwd()
    return drive.run(
        endpoints,
        job,
        address=address,
        port=port,
        folder=job.folder.parent if job else workdir / "runs",
        python=launcher.interpreter,
        workdir=workdir,
        env=launcher.env,
        environ=job.environ if job else _environ(launcher.forward),
    )


def _environ(prefixes: Sequence[str]) -> dict[str, str]:
    """Variables of this process that travel to the nodes."""
    environ = forward.variables_to_forward(prefixes)
    if "PYTHONPATH" in os.environ:
        environ["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return environ


def command_lines(job: Job, plan: Plan) -> list[str]:
    """What would be typed by hand."""
    lines = [
        f"{quote(node.transport)} < {job.home / name}"
        for node, name in zip(plan.nodes, [n for n in plan.files if n.endswith(".sh")], strict=True)
    ]
    return lines + [quote(command) for command in plan.commands]


def as_values(
    kind: str,
    job: Job,
    plan: Plan,
    arithmetic: Sequence[str],
    memory: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The plan as JSON, without secrets."""
    return {
        "kind": kind,
        "folder": str(job.folder),
        "world": plan.world,
        "files": {str(job.home / name): text for name, text in plan.files.items()},
        "commands": command_lines(job, plan),
        "environment": forward.mask_secrets(job.environ),
        "batch": list(arithmetic),
        "memory": [dict(stage) for stage in memory],
    }


def start(
    kind: str, launcher: Launcher, run: Run, job: Job, plan: Plan, write: Callable[[str], None]
) -> Outcome:
    """Write the files, then run the nodes to their end, or hand the job to the scheduler."""
    if plan.keeps_record:
        _refuse_second(job.folder, launcher)
    _write_files(job, plan)
    if not plan.keeps_record:
        with supervise.Signals() as signals:
            return supervise.run(job, plan.nodes, write, signals)
    facts: dict[str, Any] = {
        "kind": kind,
        "cluster": launcher.to_dict(),
        "config": job.config,
        "overrides": list(job.overrides),
        "world": plan.world,
        "home": str(job.home),
        "nodes": [node.name for node in plan.nodes],
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.time(),
        "state": "running",
    }
    record.write(job.home, facts)
    if plan.nodes:
        outcome = Outcome(1, "the launcher itself failed")
        try:
            outcome = restarts.run(launcher, run, job, plan, write, _on_plan)
        finally:
            done = {"state": "ended", "ended": time.time()}
            record.update(job.home, **done, code=outcome.code, why=outcome.why)
        return outcome
    return _submit(job, plan)


def _write_files(job: Job, plan: Plan) -> None:
    """Write the files of a plan. Raises UserError."""
    try:
        job.home.mkdir(parents=True, exist_ok=True)
        for name, text in plan.files.items():
            (job.home / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{job.home}: cannot be written: {error.strerror}") from error


def _on_plan(job: Job, plan: Plan) -> None:
    """Write down what is started in place of the first plan."""
    _write_files(job, plan)
    nodes = [node.name for node in plan.nodes]
    record.update(job.home, world=plan.world, nodes=nodes, overrides=list(job.overrides))


def _refuse_second(folder: Path, launcher: Launcher) -> None:
    """Raise UserError while another launcher of this machine, or a scheduler, has the folder."""
    try:
        before = record.read(folder)
    except UserError:
        return
    if before.get("state") == "running" and before.get("host") == socket.gethostname():
        if before.get("pid") != os.getpid() and is_alive(before.get("pid", 0)):
            raise UserError(
                f"{folder}: process {before['pid']} launched it and watches it; wait, or: "
                f"mm launch stop {folder}"
            )
    if before.get("state") == "submitted" and before["kind"] == launcher.to_dict()["kind"]:
        if launcher.has(before):
            raise UserError(
                f"{folder}: its job {', '.join(before['jobs'])} is with the scheduler still; wait, "
                f"or: mm launch stop {folder}"
            )


def _submit(job: Job, plan: Plan) -> Outcome:
    """Run the commands of a plan one after the other; ``{job}`` is what the one before printed."""
    said: list[str] = []
    environ = dict(os.environ) | dict(job.environ)
    for command in plan.commands:
        words = [word.replace("{job}", said[-1] if said else "") for word in command]
        try:
            done = subprocess.run(words, capture_output=True, text=True, env=environ)
        except OSError as error:
            record.update(job.home, state="ended", code=2, why=str(error))
            raise UserError(f"{words[0]}: {error.strerror}; it must be on this machine") from error
        if done.returncode:
            why = " ".join((done.stderr or done.stdout).split())
            record.update(job.home, state="ended", code=2, why=why)
            raise UserError(f"{quote(words)}: {why}")
        said.append(" ".join(done.stdout.split(";")[0].split()))
    record.update(job.home, state="submitted", jobs=said)
    return Outcome(0, f"submitted: {', '.join(said)}; watch it: mm launch status {job.folder}")
