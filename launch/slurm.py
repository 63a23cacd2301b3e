"""Slurm: one readable sbatch file that saves before its limit, requeues itself and resumes."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mm.config import Config
from mm.launch import slurm_file
from mm.launch.forward import public
from mm.launch.launcher import Job, Launcher, Node, Plan, exports
from mm.registry import LAUNCHERS

FILE = "job.sbatch"


class Container(Config):
    """The image that the ranks run in."""

    runtime: Annotated[
        Literal["pyxis", "apptainer"],
        Field(description="pyxis: flags of srun (enroot); apptainer: a command before the ranks"),
    ] = "pyxis"
    image: Annotated[str, Field(description="image, or the path of one")]
    mounts: Annotated[tuple[str, ...], Field(description="HOST:INSIDE folders")] = ()

    @property
    def flags(self) -> list[str]:
        """Options of srun."""
        if self.runtime != "pyxis":
            return []
        mounts = [f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []
        return [f"--container-image={self.image}", *mounts]

    @property
    def prefix(self) -> list[str]:
        """What stands before the command of a node."""
        if self.runtime != "apptainer":
            return []
        binds = [word for mount in self.mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", "--nv", *binds, self.image]


@LAUNCHERS.register("slurm")
class Slurm(Launcher):
    """A cluster with Slurm; the run folder is on a disk that all nodes share."""

    kind: Literal["slurm"] = "slurm"
    partition: Annotated[str | None, Field(description="--partition")] = None
    account: Annotated[str | None, Field(description="--account")] = None
    limit_min: Annotated[
        int, Field(gt=0, description="minutes that one attempt may take (--time)")
    ] = 1440
    request_gpus: Annotated[
        bool, Field(description="ask Slurm for gpus_per_node GPUs; off on CPUs")
    ] = True
    cpus_per_task: Annotated[int | None, Field(gt=0, description="CPU cores a node")] = None
    save_before_s: Annotated[
        int, Field(gt=0, description="seconds before the limit at which a checkpoint is asked for")
    ] = 180
    after_limit: Annotated[
        Literal["requeue", "chain", "array"],
        Field(
            description="what goes on after the limit: the job requeues itself; or a chain of "
            "jobs, or an array of one at a time, whose attempts follow each other"
        ),
    ] = "requeue"
    attempts: Annotated[int, Field(gt=0, description="of a chain or an array")] = 1
    restarts: Annotated[
        int, Field(ge=0, description="how often a job is requeued after an error of a rank")
    ] = 1
    container: Annotated[Container | None, Field(description="image of the ranks")] = None
    options: Annotated[tuple[str, ...], Field(description="more #SBATCH options")] = ()
    setup: Annotated[str, Field(description="shell before the ranks: module load ...")] = ""
    interactive: Annotated[
        bool, Field(description="on this console, now: salloc and srun, nothing is requeued")
    ] = False

    @model_validator(mode="after")
    def _values_fit(self) -> Slurm:
        if self.attempts > 1 and self.after_limit == "requeue":
            raise ValueError(
                "attempts: a job that requeues itself goes on until it is done; for a fixed number "
                "say after_limit=chain or after_limit=array"
            )
        if self.save_before_s >= 60 * self.limit_min:
            raise ValueError(f"save_before_s: must be below limit_min, {60 * self.limit_min} s")
        return self

    def slots(self) -> int:
        return (self.nodes or 1) * (self.gpus_per_node or 1)

    def of_size(self, processes: int) -> Self:
        return self  # its nodes are Slurm's choice: all of them or none

    def plan(self, job: Job) -> Plan:
        nodes, processes = self.nodes or 1, self.gpus_per_node or 1
        script = self._script(job, nodes, processes)
        if self.interactive:
            inside = "SLURM_JOB_ID" in os.environ  # an allocation is there: its nodes are taken
            start = [] if inside else ["salloc", "--quiet", *self._resources(job)]
            node = Node("slurm", (*start, "bash", "-s"), script, nodes * processes)
            return Plan(nodes * processes, {"slurm.sh": script}, (node,))
        file = str(job.home / FILE)
        commands = [("sbatch", "--parsable", file)]
        if self.after_limit == "chain":
            # an attempt that saved ends with 0, one that failed ends the chain
            after = ("--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
            commands += [("sbatch", "--parsable", *after, file)] * (self.attempts - 1)
        notes = ("secrets are not in the file: sbatch takes them from this environment",)
        return Plan(nodes * processes, {FILE: script}, commands=tuple(commands), notes=notes)

    def _resources(self, job: Job) -> list[str]:
        """Options of sbatch and salloc alike."""
        out = [f"--job-name={job.name}", f"--nodes={self.nodes or 1}", "--ntasks-per-node=1"]
        if self.request_gpus:
            out.append(f"--gpus-per-node={self.gpus_per_node or 1}")
        if self.cpus_per_task:
            out.append(f"--cpus-per-task={self.cpus_per_task}")
        out += [f"--partition={self.partition}"] if self.partition else []
        out += [f"--account={self.account}"] if self.account else []
        return [*out, f"--time={self.limit_min}", *self.options]

    def _batch_options(self, job: Job) -> list[str]:
        """Options of sbatch, one a line of the file."""
        out = [*self._resources(job), f"--signal=B:USR1@{self.save_before_s}", "--requeue"]
        if self.after_limit == "array":
            out.append(f"--array=1-{self.attempts}%1")
        return [*out, f"--output={job.home}/slurm-%j.out", "--open-mode=append"]

    def _script(self, job: Job, nodes: int, processes: int) -> str:
        container = self.container
        srun = ["srun", "--export=ALL", "--kill-on-bad-exit=1"]
        if self.cpus_per_task:  # since 22.05 srun does not take it from sbatch
            srun.append(f"--cpus-per-task={self.cpus_per_task}")
        srun += [*container.flags, *container.prefix] if container else []
        body = slurm_file.body(
            self.interpreter,
            job,
            workdir=self.workdir or job.workdir,
            variables=exports(public(dict(job.environ)) | self.env),
            setup=f"{self.setup.rstrip()}\n" if self.setup else "",
            port=str(self.port) if self.port else "",
            srun=shlex.join(srun),
            nodes=nodes,
            processes=processes,
            preflight=self.preflight and nodes > 1,
        )
        if self.interactive:
            return slurm_file.interactive(body)
        options, world = self._batch_options(job), nodes * processes
        return slurm_file.batch(body, options, job, world, self.after_limit, self.restarts)

    def _queue(self, record: Mapping[str, Any]) -> list[str]:
        """A line a job that Slurm still has. Raises OSError where there is no Slurm."""
        words = ["squeue", "--noheader", "--format=%i %T %M %R", f"--jobs={','.join(_ids(record))}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
        return [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]

    def has(self, record: Mapping[str, Any]) -> bool:
        try:
            return bool(self._queue(record))
        except (OSError, subprocess.TimeoutExpired):
            return False

    def status(self, record: Mapping[str, Any]) -> str:
        try:
            lines = self._queue(record)
        except (OSError, subprocess.TimeoutExpired) as error:
            lines = [f"squeue does not answer ({error}); ask on a machine of the cluster"]
        told = Path(str(record.get("home", "")), slurm_file.ATTEMPTS)
        attempts = told.read_text().splitlines() if told.is_file() else []
        queue = "; ".join(lines) or f"not in the queue any more: {', '.join(_ids(record))}"
        return f"{queue} ({attempts[-1]})" if attempts else queue

    def stop_commands(self, record: Mapping[str, Any], now: bool) -> Sequence[Sequence[str]]:
        ids = _ids(record)
        if now:
            return [["scancel", *ids]]
        # Later attempts first; the file says to the job that what ends is not to be requeued.
        return [
            ["touch", str(Path(str(record.get("home", "")), slurm_file.STOP))],
            ["scancel", "--state=PENDING", *ids],
            ["scancel", "--quiet", "--signal=USR1", *ids],
        ]

    def log_command(self, record: Mapping[str, Any]) -> Sequence[str]:
        files = sorted(Path(str(record.get("home", ""))).glob("slurm-*.out"))
        return ["tail", *map(str, files)] if files else ()


def _ids(record: Mapping[str, Any]) -> list[str]:
    return [str(job) for job in record.get("jobs", ())]
