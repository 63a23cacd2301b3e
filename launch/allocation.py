"""What schedulers say in the environment: which node this is, or which rank."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from mm.errors import UserError


class Node(NamedTuple):
    """Place of this machine among those of a job that a scheduler started once a node."""

    source: str
    nodes: int
    rank: int
    address: str  # of the first node
    port: int | None
    processes: int | None


def node(environ: Mapping[str, str] | None = None) -> Node | None:
    """The place of this machine, from SkyPilot's, PyTorch operators' or Slurm's variables.

    None when no scheduler started this. Raises UserError when the first node has no address.
    """
    e = os.environ if environ is None else environ
    count = lambda name: int(e[name]) if e.get(name, "").isdigit() else None
    if "SKYPILOT_NODE_RANK" in e:
        hosts = e.get("SKYPILOT_NODE_IPS", "").split()
        if not hosts:
            raise UserError("SKYPILOT_NODE_IPS is empty, so the first node has no address")
        return Node(
            "SkyPilot",
            count("SKYPILOT_NUM_NODES") or len(hosts),
            int(e["SKYPILOT_NODE_RANK"]),
            hosts[0],
            None,
            count("SKYPILOT_NUM_GPUS_PER_NODE") or None,
        )
    if "PET_NODE_RANK" in e and "PET_MASTER_ADDR" in e:  # Kubeflow's operators
        return Node(
            "Kubeflow",
            count("PET_NNODES") or 1,
            int(e["PET_NODE_RANK"]),
            e["PET_MASTER_ADDR"],
            count("PET_MASTER_PORT"),
            count("PET_NPROC_PER_NODE"),
        )
    tasks, nodes = count("SLURM_STEP_NUM_TASKS"), count("SLURM_STEP_NUM_NODES")
    if tasks and nodes and tasks == nodes and "SLURM_NODEID" in e:
        hosts = expand_hosts(e.get("SLURM_STEP_NODELIST", ""))
        return Node(
            "Slurm",
            nodes,
            int(e["SLURM_NODEID"]),
            e.get("MASTER_ADDR") or hosts[0],
            count("MASTER_PORT") or _port_of(e.get("SLURM_JOB_ID", "0")),
            count("SLURM_GPUS_ON_NODE"),
        )
    return None


# Who started one process a rank: its variables for RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE.
PROCESSES = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "submitit": (
        "SUBMITIT_LOCAL_GLOBALID",
        "SUBMITIT_LOCAL_NTASKS",
        "SUBMITIT_LOCAL_LOCALID",
        "SUBMITIT_LOCAL_NTASKS",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def adopt_ranks(environ: MutableMapping[str, str] | None = None) -> str | None:
    """Set torchrun's variables from those of another starter; returns whose they were.

    What is set already wins; a world of one sets nothing. Raises UserError when several nodes have
    no MASTER_ADDR: a guess would be every node's own loopback.
    """
    e = os.environ if environ is None else environ
    if "CROSS_RANK" in e and "LOCAL_SIZE" in e:  # DeepSpeed's launcher; the rest are as torchrun's
        e.setdefault("LOCAL_WORLD_SIZE", e["LOCAL_SIZE"])
    if "RANK" in e or "WORLD_SIZE" in e:
        return None
    for source, names in PROCESSES.items():
        if not all(name in e for name in names):
            continue
        rank, world, local, here = (re.match(r"\d+", e[name]) for name in names)
        if not (rank and world and local and here) or int(world[0]) < 2:
            continue
        if source == "Slurm":
            hosts = expand_hosts(e.get("SLURM_STEP_NODELIST", ""))
            if hosts:
                e.setdefault("MASTER_ADDR", hosts[0])
        if "MASTER_ADDR" not in e:
            if int(here[0]) < int(world[0]):
                raise UserError(
                    f"{source} started {world[0]} processes on several nodes and MASTER_ADDR is "
                    "not set; say: mpirun -x MASTER_ADDR=<first node> ..., or use: mm launch mpi"
                )
            e["MASTER_ADDR"] = "127.0.0.1"
        job = e.get("SLURM_JOB_ID") or e.get("SUBMITIT_LOCAL_JOB_ID") or str(os.getppid())
        e.setdefault("MASTER_PORT", str(_port_of(job)))
        e["RANK"], e["WORLD_SIZE"] = rank[0], world[0]
        e["LOCAL_RANK"], e["LOCAL_WORLD_SIZE"] = local[0], here[0]
        return source
    return None


def _port_of(job: str) -> int:
    """A port that all processes of a job derive alike."""
    return 20000 + int(re.sub(r"\D", "", job) or 0) % 20000


def expand_hosts(text: str) -> list[str]:
    """Slurm's list of hosts, written out: ``n[08-10,12],login`` is n08, n09, n10, n12, login."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        found = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if found is None:
            hosts.append(part)
            continue
        before, inside, after = found.groups()
        for piece in inside.split(","):
            first, _, last = piece.partition("-")
            for number in range(int(first), int(last or first) + 1):
                hosts += expand_hosts(f"{before}{number:0{len(first)}d}{after}")
    return hosts
