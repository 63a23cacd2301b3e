"""Open MPI's mpirun: one process a rank, whose place is in the variables that it sets."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from mm.errors import UserError
from mm.launch.environment import free_port
from mm.launch.forward import public
from mm.launch.hostfile import Host, read_hostfile
from mm.launch.launcher import PORT, Job, Launcher, Node, Plan, exports, quote
from mm.launch.preflight import inside
from mm.launch.ssh import first_address
from mm.launch.torchrun import watch_input
from mm.registry import LAUNCHERS

LOG = "mpirun.log"
# Open MPI 4's daemons map the topology of the host into a hole of their address space. Now and
# then that hole is where their stack grows, and they die of a segmentation fault. Without the map
# each rank finds the topology itself.
_NO_SHARED_TOPOLOGY = "OMPI_MCA_rtc_hwloc_vmhole=none"


@LAUNCHERS.register("mpi")
class Mpi(Launcher):
    """Hosts that mpirun reaches; `mm train` reads the ranks from its variables."""

    kind: Literal["mpi"] = "mpi"
    hostfile: Annotated[
        Path | None, Field(description="one line a machine: HOST slots=N; default: this machine")
    ] = None
    address: Annotated[
        str | None, Field(description="of the first node, as all nodes reach it")
    ] = None
    options: Annotated[str, Field(description="more options of mpirun")] = ""

    def slots(self) -> int:
        return sum(len(host.slots) for host in self._hosts())

    def of_size(self, processes: int) -> Self:
        return self  # mpirun has no spare hosts

    def plan(self, job: Job) -> Plan:
        hosts = self._hosts()
        world, options, files = sum(len(h.slots) for h in hosts), ["--tag-output"], {}
        rank = [self.interpreter, "-m", *job.words]
        if self.hostfile is None:
            address = self.address or "127.0.0.1"
            port = self.port or free_port()
            options.append("--oversubscribe")  # slots are no limit of one's own machine
        else:
            address = self.address or first_address(hosts, self.hostfile)
            port = self.port or PORT
            files["hostfile"] = "".join(f"{h.name} slots={len(h.slots)}\n" for h in hosts)
            options += ["--hostfile", str(job.home / "hostfile")]
        if len(hosts) > 1:
            find = quote([self.interpreter, "-m", "mm.launch.interface", address])
            rank = ["bash", "-c", f'found=$({find}) && eval "$found" && exec {quote(rank)}']
        env = public(dict(job.environ)) | self.env
        env |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        # `-x NAME` takes the value from the environment: secrets stand on no command line
        names = sorted({*env, *job.environ, "PATH"})
        given = [*options, *shlex.split(self.options)]
        given += [word for name in names for word in ("-x", name)]
        words = ["mpirun", "-np", str(world), *given]
        root = "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        files["mpirun.sh"] = (
            "{\n"
            f"cd {shlex.quote(str(self.workdir or job.workdir))} || exit 3\n"
            f"{exports(env)}"
            f"[ $(id -u) != 0 ] || export {root} # as in a container\n"
            f"export {_NO_SHARED_TOPOLOGY}\n"
            f"{self._check(job, hosts, given, address, port)}"
            f"{quote([*words, *rank])} < /dev/null \\\n"
            f"    > >(sed -u '{_PREFIX}' | tee {shlex.quote(str(job.home / LOG))}) 2>&1 &\n"
            f"{watch_input('kill -USR1 $run')}"  # mpirun passes it on
            "}\n"
        )
        return Plan(world, files, (Node("mpirun", ("bash", "-s"), files["mpirun.sh"], world),))

    def _check(
        self, job: Job, hosts: Sequence[Host], given: Sequence[str], address: str, port: int
    ) -> str:
        """Shell that checks the hosts, one process on each, before the ranks."""
        if not self.preflight or len(hosts) < 2:
            return ""
        check = inside.command(
            self.interpreter,
            job,
            nodes=len(hosts),
            processes=len(hosts[0].slots),
            node_rank="$OMPI_COMM_WORLD_RANK",
            address=address,
            port=str(port),
        )
        words = ["mpirun", "-np", str(len(hosts)), "--map-by", "ppr:1:node", *given]
        words += ["bash", "-c", check]
        return f"{quote(words)} < /dev/null || exit 2\n"

    def _hosts(self) -> list[Host]:
        """The hosts and slots that are used. Raises UserError."""
        if self.hostfile is None:
            if (self.nodes or 1) > 1:
                raise UserError(f"nodes: {self.nodes}: name them: cluster.hostfile=FILE")
            return [Host("localhost", tuple(range(self.gpus_per_node or 1)), 0)]
        found = read_hostfile(self.hostfile)
        if (self.nodes or 1) > len(found):
            raise UserError(f"{self.hostfile}: has {len(found)} hosts, asked are {self.nodes}")
        return [h._replace(slots=h.slots[: self.gpus_per_node]) for h in found[: self.nodes]]

    def log_command(self, record: Mapping[str, Any]) -> Sequence[str]:
        return ["tail", str(Path(str(record.get("home", "")), LOG))]


# What --tag-output writes before a line, as torchrun's prefix.
_PREFIX = r"s/^\[[0-9]*,\([0-9]*\)\]<std[a-z]*>: \{0,1\}/[rank \1] /"
