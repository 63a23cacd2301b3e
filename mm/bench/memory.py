"""Peak memory of a piece of work, on the CPU (resident pages) or an accelerator (its allocator)."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 1024**2


def peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    """Run ``work`` and return by how much memory in use rose above what it was before, in MiB.

    None where the system does not tell: on the CPU it takes Linux' /proc/self/clear_refs.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins again
        before = _status("VmRSS")
    except OSError:
        work()
        return None
    work()
    return (_status("VmHWM") - before) / 1024


def available_mib(device: torch.device) -> float:
    """What a further piece of work may take; infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / MIB
    free = float("inf")
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) / 1024 if found else free
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        # Not memory.current: that counts file pages, which the system gives up when asked.
        used = re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        return min(free, (int(limit) - int(used[1])) / MIB) if limit.isdigit() and used else free
    except OSError:
        return free


def _trim() -> None:
    """Give freed pages back to the system, or the next peak would hide in them (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """A figure of /proc/self/status in KiB. Raises OSError when it is not there."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1])
