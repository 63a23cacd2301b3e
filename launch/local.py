"""This machine: torchrun with a free port."""

from __future__ import annotations

from typing import Literal

from mm.errors import UserError
from mm.launch import allocation, environment
from mm.launch.launcher import PORT, Job, Launcher, Node, Plan
from mm.launch.torchrun import node_script
from mm.registry import LAUNCHERS


@LAUNCHERS.register("local")
class Local(Launcher):
    """Processes of this machine.

    Where SkyPilot, Slurm or PyTorch's operator started this command once on every node, it is one
    node of their job.
    """

    kind: Literal["local"] = "local"

    def plan(self, job: Job) -> Plan:
        given = allocation.node()
        processes = self.gpus_per_node or (given and given.processes) or 1
        if given is None:
            if (self.nodes or 1) > 1:
                raise UserError(
                    f"nodes: {self.nodes}: 'local' is one machine; for more: mm launch ssh"
                )
            place = allocation.Node("this machine", 1, 0, "127.0.0.1", None, None)
        else:
            place = given
        port = self.port or place.port or (PORT if given else environment.free_port())
        script = node_script(
            self.interpreter,
            job,
            self.workdir or job.workdir,
            self.env,
            nodes=place.nodes,
            node_rank=place.rank,
            processes=processes,
            address=place.address,
            port=port,
        )
        notes = (f"node {place.rank} of {place.nodes}, by {place.source}",) if given else ()
        name = f"node_{place.rank}"
        node = Node(name, ("bash", "-s"), script, processes)
        files, world = {f"{name}.sh": script}, processes * place.nodes
        return Plan(world, files, (node,), notes=notes, keeps_record=place.rank == 0)
