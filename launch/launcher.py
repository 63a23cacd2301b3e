"""What every launcher is: a cluster YAML that turns a job into files, nodes and commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field

from mm.config import Config
from mm.launch.preflight.check import Endpoint

PORT = 29500


class Job(NamedTuple):
    """What is to be trained, or tried (``mm verify``)."""

    config: str
    overrides: tuple[str, ...]
    name: str
    folder: Path  # of the run, absolute
    environ: Mapping[str, str]  # forwarded, secrets among them
    workdir: Path
    command: str = "train"

    @property
    def words(self) -> tuple[str, ...]:
        """Arguments of ``python -m``."""
        return ("mm", self.command, self.config, *self.overrides)

    @property
    def home(self) -> Path:
        """Where what the launcher writes is found again."""
        return self.folder / "launch"


class Node(NamedTuple):
    """A shell on one machine: its script goes to the standard input of ``transport``."""

    name: str
    transport: tuple[str, ...]
    script: str
    processes: int


class Plan(NamedTuple):
    """What a launcher would do.

    Either ``nodes`` are started and watched from here, or ``commands`` hand the job to a scheduler.
    """

    world: int
    files: dict[str, str]  # name below `Job.home` -> text
    nodes: tuple[Node, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    keeps_record: bool = True  # False: another node of a scheduler's job does


class Launcher(Config):
    """Keys that every cluster YAML has."""

    nodes: Annotated[int | None, Field(gt=0, description="machines")] = None
    gpus_per_node: Annotated[
        int | None, Field(gt=0, description="processes a machine, one a GPU; on CPUs: processes")
    ] = None
    gpu: Annotated[
        str | None,
        Field(
            description="card of the machines, for the memory that --dry-run predicts: a name of "
            "mm plan --gpu"
        ),
    ] = None
    python: Annotated[
        str | None, Field(description="interpreter on the nodes; default: this one")
    ] = None
    workdir: Annotated[
        Path | None, Field(description="folder that the nodes work in; default: this one")
    ] = None
    port: Annotated[
        int | None, Field(gt=0, lt=65536, description="of the rendezvous on the first node")
    ] = None
    restarts: Annotated[
        int,
        Field(
            ge=0,
            description="how often a job that failed is started again from its newest checkpoint, "
            "on the hosts that are left",
        ),
    ] = 0
    hang_s: Annotated[
        float,
        Field(
            ge=0,
            description="seconds without a change inside a step, and 10 times the longest step at "
            "least, after which the launcher calls it a hang; 0 = never",
        ),
    ] = 40.0
    preflight: Annotated[
        bool, Field(description="check several nodes before they train; off: --no-preflight")
    ] = True
    env: Annotated[dict[str, str], Field(description="variables that every node gets")] = {}
    forward: Annotated[
        tuple[str, ...], Field(description="more prefixes of variables that are forwarded")
    ] = ()

    @property
    def interpreter(self) -> str:
        return self.python or sys.executable

    def plan(self, job: Job) -> Plan:
        """What would be done for ``job``. Raises UserError; needs no cluster."""
        raise NotImplementedError

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Hosts that this machine itself reaches, for the preflight; none of a scheduler's."""
        return ()

    def meeting_point(self) -> tuple[str, int]:
        """Address and port of the first host, as all hosts reach it. Raises UserError."""
        return "127.0.0.1", self.port or PORT

    @property
    def lease_s(self) -> float:
        """Seconds after which a host that was lost has ended its ranks itself."""
        return 0.0

    def is_there(self, host: str) -> bool:
        """Whether a host that failed can be reached."""
        return True

    def without(self, hosts: Collection[str]) -> Self:
        """This launcher without some hosts, spares in their place. Raises UserError: none left."""
        return self

    def slots(self) -> int:
        """Processes that the hosts have room for, no more than at first."""
        return self.gpus_per_node or 1

    def of_size(self, processes: int) -> Self:
        """This launcher with that many processes, no more than `slots`."""
        return self.model_copy(update={"gpus_per_node": processes})

    def status(self, record: Mapping[str, Any]) -> str:
        """One line about a job that a scheduler has; '' when this machine watches it."""
        return ""

    def has(self, record: Mapping[str, Any]) -> bool:
        """True while a scheduler has a job of this record: no second one is to be handed over."""
        return False

    def stop_commands(self, record: Mapping[str, Any], now: bool) -> Sequence[Sequence[str]]:
        """Commands that end a job of a scheduler: after a checkpoint, or at once."""
        return ()

    def log_command(self, record: Mapping[str, Any]) -> Sequence[str]:
        """Command that shows the logs where they are no files of the run folder."""
        return ()


def quote(words: Sequence[str]) -> str:
    """A shell command of these words."""
    return shlex.join(words)


def exports(variables: Mapping[str, str]) -> str:
    """Lines that export variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
