"""What the process was given: ranks, threads, ports, bf16 hardware.

Reads the environment, imports no torch.

`prepare` must run before the first `import torch`: OpenMP reads its settings once, when it is
loaded.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

from mm.launch.allocation import adopt_ranks
from mm.launch.interface import set_interface

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Ranks(NamedTuple):
    """Place of this process among those of the job (torchrun's variables; alone: 0 of 1)."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks() -> Ranks:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""
    read = lambda name, default: int(os.environ.get(name) or default)
    world = read("WORLD_SIZE", 1)
    return Ranks(read("RANK", 0), world, read("LOCAL_RANK", 0), read("LOCAL_WORLD_SIZE", world))


def prepare(environ: MutableMapping[str, str] | None = None) -> None:
    """Set what must stand before torch and DeepSpeed are imported; what is set already wins.

    - OpenMP threads that wait sleep instead of spinning: beside a busy neighbour spinning made
      steps 20 times slower.
    - DeepSpeed's C++ builds go to a folder of this project: a stale lock in the shared one hangs
      `deepspeed.init_distributed` for ever.
    - Ranks that MPI, Slurm, submitit or DeepSpeed have given become torchrun's variables.
    - Ranks of several nodes talk over the network interface that leads to the first one.
    """
    environ = os.environ if environ is None else environ
    adopt_ranks(environ)
    set_interface(environ)
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environ.setdefault("GOMP_SPINCOUNT", "0")
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "mm" / "torch_extensions"))


def cores() -> int:
    """CPU cores that this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # macOS
        return max(1, os.cpu_count() or 1)


def memory_bytes() -> int:
    """Main memory that this machine has, or that its control group may use."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limit = Path("/sys/fs/cgroup", name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            found = min(found, int(limit))
    return found


def cpu_threads(asked: int | None = None) -> int:
    """Threads for this process: ``asked``, else OMP_NUM_THREADS, else its share of the cores."""
    if asked is not None:
        return max(1, asked)
    given = os.environ.get("OMP_NUM_THREADS", "")
    # torchrun sets 1 when nothing is said; a share of the cores is what its user wants
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, cores() // ranks().local_world)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation, up to 32 MiB a piece.

    ``MALLOC_*`` or ``GLIBC_TUNABLES`` in the environment win, other systems are left alone.

    Otherwise every tensor of some 100 KiB is new pages from the system, which clears them: a third
    of the time of a linear mixer at 16k tokens.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def free_port() -> int:
    """A TCP port that was free a moment ago, for a rendezvous on this machine."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def cpu_has_bf16() -> bool:
    """True when the CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX).

    Emulation is slower than fp32.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next(
        (line for line in text.splitlines() if line.startswith(("flags", "Features"))), ""
    ).split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
