"""The process group of all ranks: entered once a process, one device a rank."""

from __future__ import annotations

import atexit
import datetime
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mm.decoders.device import why_no_gpu
from mm.errors import UserError
from mm.launch import environment

TIMEOUT = datetime.timedelta(minutes=30)  # of a collective
NO_GPU = "no GPU: "  # of what a rank tells the others


def join(threads: int | None = None) -> torch.device:
    """Enter the process group of all ranks (once a process) and return this rank's device.

    Alone it needs no port and no variables; under torchrun it takes them. The group lives until the
    process ends, because DeepSpeed keeps handles of its subgroups for good; then it is destroyed
    and its threads come to rest, whatever ended the process: without either, some DeepSpeed runs
    on a CPU abort at exit, their work done. A group that the caller made is used and left alone.

    Raises UserError where processes have no GPU of their own on a machine with GPUs.
    """
    me = environment.ranks()
    if torch.cuda.is_available():
        try:
            device = torch.device("cuda", local_device(me, torch.cuda.device_count()))
        except UserError as error:
            if me.world > 1 and not dist.is_initialized():
                meet(f"{socket.gethostname()} {NO_GPU}{error}")  # raises: nobody waits
            raise
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(environment.cpu_threads(threads))
        environment.keep_freed_memory()
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", str(me.local_rank))  # DeepSpeed asserts on it
        _init(me, device)
        atexit.register(_leave)
    return device


def _init(me: environment.Ranks, device: torch.device) -> None:
    from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

    store = HashStore() if me.world == 1 else meet(describe(device))
    backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    rank = me.rank if me.world > 1 else 0
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=me.world, timeout=TIMEOUT, device_id=own
    )


def meet(mine: str) -> Any:
    """The store of all ranks, once each has told its device and all of them fit together.

    Before anything connects: NCCL waits, or fails without naming them, where two ranks share a GPU,
    and it waits for a rank that found none and took gloo until its time is over.

    Args:
        mine: this rank's `describe`.

    Raises UserError, on every rank the same.
    """
    store, rank, world = find_store()
    everyone = tell_all(store, rank, world, mine)
    require_one_kind(everyone)
    require_own_devices(everyone)
    return store


def find_store() -> tuple[Any, int, int]:
    """The store of the launcher, this rank and the world: no group is entered, nothing connects."""
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun's own store outlives a restart of its processes: those would find the addresses of
    # the dead. Several machines may count their restarts differently.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    return store, rank, world


def describe(device: torch.device) -> str:
    """Machine and device of this rank in one line: its GPU's number, or why it has none."""
    host = socket.gethostname()
    if device.type == "cuda":
        return f"{host} {torch.cuda.get_device_properties(device).uuid}"
    return f"{host} {NO_GPU}{why_no_gpu() or 'PyTorch sees none'}"


def local_device(me: environment.Ranks, count: int) -> int:
    """Number of this process's GPU among the ``count`` that it sees.

    The only one where the launcher shows each process its own (`require_own_devices` finds two
    processes on one). Raises UserError where there are fewer GPUs than processes.
    """
    if me.local_rank < count:
        return me.local_rank
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if count == 1 and shown and "," not in shown:
        return 0
    raise UserError(
        f"process {me.local_rank} of {me.local_world} on this machine sees {count} GPUs: start one "
        f"process a GPU (torchrun --nproc-per-node {count} ..., srun --ntasks-per-node {count} ...)"
    )


def processes_here(most: int, without_gpu: int) -> int:
    """How many of ``most`` processes can have a device on this machine; 1 at least.

    One a GPU where PyTorch sees any (`local_device` refuses more), else ``without_gpu``: the cores.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return max(1, min(most, gpus or without_gpu))


def require_one_kind(names: Sequence[str]) -> None:
    """Check that all ranks have a GPU, or none has. ``names``: as of `describe`, in rank order.

    Raises UserError naming the first rank without one, its machine and the reason.
    """
    without = [rank for rank, name in enumerate(names) if NO_GPU in name]
    if not without or len(without) == len(names):
        return
    host, _, why = names[without[0]].partition(f" {NO_GPU}")
    raise UserError(
        f"rank {without[0]} on {host} has no GPU ({why}), and {len(names) - len(without)} of "
        f"{len(names)} ranks have one: mend that machine (mm doctor says more) or leave it out; "
        "for the CPU alone set CUDA_VISIBLE_DEVICES= for all ranks"
    )


def require_own_devices(names: Sequence[str]) -> None:
    """Check that no two ranks have one GPU. ``names``: as of `describe`, in rank order.

    Raises UserError naming two ranks.
    """
    first: dict[str, int] = {}
    for rank, name in enumerate(names):
        if NO_GPU in name:
            continue
        if name in first:
            raise UserError(
                f"ranks {first[name]} and {rank} share the GPU {name}: start one process a GPU, or "
                "let the launcher show each process its own (srun --gpus-per-task 1)"
            )
        first[name] = rank


def tell_all(store: Any, rank: int, world: int, mine: str) -> list[str]:
    """``mine`` of every rank, in their order, without a collective.

    Rank 0, which may keep the store, leaves last: whoever then ends has let the others read.
    """
    store.set(f"mm/device/{rank}", mine)
    found = [store.get(f"mm/device/{other}").decode() for other in range(world)]
    store.set(f"mm/device/{rank}/read", "")
    if rank == 0:
        store.wait([f"mm/device/{other}/read" for other in range(world)])
    return found


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        wait_for_threads()


def wait_for_threads(limit_s: float = 5.0) -> bool:
    """Wait until no other thread of this process runs; False after ``limit_s`` seconds.

    A group that somebody holds keeps gloo's threads. One of them lets go of the last collective's
    tensors only when it is scheduled; where the interpreter is being taken apart by then, it dies
    in the middle of that and the whole process with it ("terminate called without an active
    exception"): of 16 processes on a busy machine, two.
    """
    tasks, end, idle = Path("/proc/self/task"), time.monotonic() + limit_s, 0
    while idle < 3 and time.monotonic() < end:
        time.sleep(0.01)  # lends the interpreter's lock to whom it holds up
        idle = 0 if tasks.is_dir() and any(_runs(t) for t in tasks.iterdir()) else idle + 1
    return idle >= 3


def _runs(task: Path) -> bool:
    if task.name == str(threading.get_native_id()):
        return False
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in "RD"
    except OSError:  # it has ended
        return False
