"""Machines of a hostfile: plain ssh and torchrun, or DeepSpeed's launcher."""

from __future__ import annotations

import ipaddress
import shlex
import socket
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr

from mm.errors import UserError, did_you_mean
from mm.launch.forward import public
from mm.launch.hostfile import Host, read_hostfile, select
from mm.launch.launcher import PORT, Job, Launcher, Node, Plan, exports, quote
from mm.launch.preflight.check import Endpoint
from mm.launch.torchrun import LEASE_S, node_script, watch_input
from mm.registry import LAUNCHERS

# A key or nothing, an end to waiting, and a dead host noticed after 15 s.
OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"


@LAUNCHERS.register("ssh")
class Ssh(Launcher):
    """Machines that ssh reaches without a password, named in a hostfile."""

    kind: Literal["ssh"] = "ssh"
    hostfile: Annotated[Path, Field(description="one line a machine: HOST slots=N")] = Path(
        "hostfile"
    )
    include: Annotated[str, Field(description="hosts and slots: host1@host2:0,2")] = ""
    exclude: Annotated[str, Field(description="hosts and slots that are left out")] = ""
    through: Annotated[
        Literal["ssh", "deepspeed"],
        Field(description="ssh: torchrun on every host; deepspeed: its launcher (pdsh)"),
    ] = "ssh"
    no_ssh: Annotated[
        bool,
        Field(description="deepspeed: this command is started on every host by other means"),
    ] = False
    node_rank: Annotated[
        int | None, Field(ge=0, description="no_ssh: the place of this host in the hostfile")
    ] = None
    address: Annotated[
        str | None, Field(description="of the first node, as all nodes reach it")
    ] = None
    options: Annotated[str, Field(description="options of ssh")] = OPTIONS

    spares: Annotated[
        tuple[str, ...],
        Field(description="hosts of the hostfile that wait until another one is left out"),
    ] = ()
    restarts: Annotated[
        int, Field(ge=0, description="starts after a failure, on the hosts that are left")
    ] = 3
    _out: frozenset[str] = PrivateAttr(frozenset())
    _size: int | None = PrivateAttr(None)

    def hosts(self) -> list[Host]:
        """The hosts that are used, with the slots that are used. Raises UserError."""
        found = select(read_hostfile(self.hostfile), self.include, self.exclude)
        names = [host.name for host in found]
        for name in self.spares:
            if name not in names:
                raise UserError(f"spares: no host '{name}'{did_you_mean(name, names)}")
        chosen = [host for host in found if host.name not in self.spares]
        waiting = [host for host in found if host.name in self.spares]
        if self.nodes is not None:
            if self.nodes > len(chosen):
                raise UserError(f"{self.hostfile}: has {len(chosen)} hosts, asked are {self.nodes}")
            chosen, waiting = chosen[: self.nodes], chosen[self.nodes :] + waiting
        if self.gpus_per_node is not None:
            for host in chosen:
                if self.gpus_per_node > len(host.slots):
                    raise UserError(
                        f"{self.hostfile}:{host.line}: '{host.name}' has {len(host.slots)} slots, "
                        f"asked are {self.gpus_per_node}"
                    )
            most = self.gpus_per_node
            chosen, waiting = (
                [host._replace(slots=host.slots[:most]) for host in hosts]
                for hosts in (chosen, waiting)
            )
        if not chosen:
            raise UserError(f"{self.hostfile}: all of its hosts are spares")
        return self._left(chosen, waiting)

    def _left(self, chosen: list[Host], waiting: list[Host]) -> list[Host]:
        """Of the hosts those that are not left out, filled up from those that wait."""
        room = self._size or sum(len(host.slots) for host in chosen)
        hosts = [host for host in chosen if host.name not in self._out]
        if self._out:
            hosts += [host for host in waiting if host.name not in self._out]
        out = []
        for host in hosts:
            if room > 0:
                out.append(host._replace(slots=host.slots[:room]))
                room -= len(host.slots)
        if not out:
            raise UserError("no host is left")
        return out

    def without(self, hosts: Collection[str]) -> Self:
        made = self.model_copy()
        made._out = frozenset(hosts)
        made.hosts()
        return made

    def slots(self) -> int:
        return sum(len(host.slots) for host in self.hosts())

    def of_size(self, processes: int) -> Self:
        made = self.model_copy()
        made._size = processes
        return made

    @property
    def lease_s(self) -> float:
        return LEASE_S + 2.0

    def is_there(self, host: str) -> bool:
        if self.through == "deepspeed":  # what failed is its launcher, on this machine
            return True
        command = ["ssh", *shlex.split(self.options), host, "true"]
        try:
            return not subprocess.run(command, capture_output=True, timeout=20).returncode
        except subprocess.TimeoutExpired:
            return False

    def transport(self, host: Host) -> tuple[str, ...]:
        """Command whose standard input is a shell of the host."""
        return ("ssh", *shlex.split(self.options), host.name, "bash -s")

    def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(Endpoint(h.name, self.transport(h), len(h.slots)) for h in self.hosts())

    def meeting_point(self) -> tuple[str, int]:
        address = self.address or first_address(self.hosts(), self.hostfile)
        return address, self.port or PORT

    def plan(self, job: Job) -> Plan:
        hosts = self.hosts()
        world = sum(len(host.slots) for host in hosts)
        address, port = self.meeting_point()
        if self.through == "deepspeed":
            return self._deepspeed(job, hosts, world, address, port)
        files, nodes = {}, []
        for rank, host in enumerate(hosts):
            env = dict(self.env)
            if host.slots != tuple(range(len(host.slots))):
                env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.slots))
            script = node_script(
                self.interpreter,
                job,
                self.workdir or job.workdir,
                env,
                nodes=len(hosts),
                node_rank=rank,
                processes=len(host.slots),
                address=address,
                port=port,
                lease_s=LEASE_S,
            )
            files[f"node_{rank}.sh"] = script
            nodes.append(Node(host.name, self.transport(host), script, len(host.slots)))
        return Plan(world, files, tuple(nodes))

    def _deepspeed(self, job: Job, hosts: list[Host], world: int, address: str, port: int) -> Plan:
        """DeepSpeed's launcher; it reads a hostfile, and a file of variables for every host."""
        if self.no_ssh and self.node_rank is None:
            raise UserError("no_ssh: say which host this is: cluster.node_rank=0, 1, ...")
        lines = "".join(f"{host.name} slots={len(host.slots)}\n" for host in hosts)
        env = public(dict(job.environ)) | self.env
        where = [f"--master_addr={address}", f"--master_port={port}"]
        where += [f"--hostfile={job.home / 'hostfile'}"]
        if self.no_ssh:
            where += ["--no_ssh", f"--node_rank={self.node_rank}"]
        else:
            where += ["--launcher=pdsh", "--force_multi"]
        where += ["--no_local_rank"]  # `mm train` reads the environment
        words = [self.interpreter, "-m", "deepspeed.launcher.runner", *where]
        words += ["--module", *job.words]
        script = (
            "{\n"
            f"cd {shlex.quote(str(self.workdir or job.workdir))} || exit 3\n"
            f"{exports(env)}"
            f"export DS_ENV_FILE={shlex.quote(str(job.home / 'deepspeed_env'))}\n"
            f"export PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND={shlex.quote(self.options)}\n"
            f"export PATH={shlex.quote(str(Path(self.interpreter).parent))}:$PATH\n"
            "trap '' USR1\n"
            f"{quote(words)} < /dev/null &\n"
            f"{watch_input()}"
            "}\n"
        )
        pairs = "".join(f"{name}={value}\n" for name, value in env.items())
        files = {"hostfile": lines, "deepspeed_env": pairs, "deepspeed.sh": script}
        return Plan(world, files, (Node("deepspeed", ("bash", "-s"), script, world),))


def first_address(hosts: list[Host], hostfile: Path) -> str:
    """Where the first host is reached from all. Raises UserError instead of a loopback address."""
    first = hosts[0]
    if len(hosts) == 1:
        return "127.0.0.1"
    name = _hostname(first.name)
    mend = "write its address into the hostfile, or say cluster.address=..."
    try:
        found = socket.gethostbyname(name)
    except OSError as error:
        raise UserError(
            f"{hostfile}:{first.line}: '{first.name}' has no address here "
            f"({error.args[-1]}); {mend}"
        ) from error
    if ipaddress.ip_address(found).is_loopback:
        raise UserError(
            f"{hostfile}:{first.line}: '{first.name}' is {found} here, which no other host "
            "reaches; "
            f"{mend}"
        )
    return found


def _hostname(name: str) -> str:
    """What ssh would connect to: an alias of its configuration has another name."""
    try:
        said = subprocess.run(
            ["ssh", "-G", name], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return name.rpartition("@")[2]
    found = [line.split(None, 1)[1] for line in said.splitlines() if line.startswith("hostname ")]
    return found[0] if found else name.rpartition("@")[2]
