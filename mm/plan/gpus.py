"""Rates of accelerators from their makers' data sheets, dense (not sparse), and of this CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mm.errors import UserError, did_you_mean

GIB = 1024**3
GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Gpu:
    """What one device can do at most.

    Attributes:
        memory: bytes.
        bf16, tf32, fp32: operations a second; tf32 of tensor cores, fp32 without.
        bandwidth: of memory, bytes a second.
        inside: to the other devices of its node, bytes a second and direction.
        outside: of its network card, as is usual; bytes a second and direction.
        source: where the figures stand.
    """

    name: str
    memory: int
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    inside: float
    outside: float
    source: str
    launch_s: float = 6e-6  # of one operator, from Python
    measured: bool = False


def _gpu(
    name: str, memory_gb: float, bf16: float, tf32: float, fp32: float, bandwidth_gb: float,
    inside_gb: float, outside_gb: float, source: str,
) -> Gpu:  # fmt: skip
    return Gpu(
        name, int(memory_gb * GB), bf16 * TERA, tf32 * TERA, fp32 * TERA, bandwidth_gb * GB,
        inside_gb * GB, outside_gb * GB, source,
    )  # fmt: skip


# memory GB, bf16, tf32, fp32 TFLOPS, memory GB/s, node GB/s, network GB/s
GPUS = {
    g.name: g
    for g in (
        _gpu("a100", 80, 312, 156, 19.5, 2039, 300, 25, "NVIDIA A100 80GB SXM data sheet, 2021"),
        _gpu("h100", 80, 989.4, 494.7, 67, 3350, 450, 50, "NVIDIA H100 SXM data sheet, 2023"),
        _gpu("h200", 141, 989.4, 494.7, 67, 4800, 450, 50, "NVIDIA H200 SXM data sheet, 2024"),
        _gpu("b200", 180, 2250, 1125, 75, 7700, 900, 50, "NVIDIA HGX B200 data sheet, 2025, / 8"),
        _gpu("l40s", 48, 362, 183, 91.6, 864, 32, 25, "NVIDIA L40S data sheet, 2023"),
        _gpu("rtx4090", 24, 165.2, 82.6, 82.6, 1008, 32, 3, "NVIDIA Ada architecture paper, 2022"),
    )
}


def find(name: str) -> Gpu:
    """A device by name; "cpu" is measured here, in half a second. Raises UserError."""
    if name == "cpu":
        return measure_cpu()
    if name not in GPUS:
        known = [*GPUS, "cpu"]
        raise UserError(f"--gpu {name}: no such device{did_you_mean(name, known)}")
    return GPUS[name]


def measure_cpu() -> Gpu:
    """Rates of this machine's CPU, as many threads as torch uses."""
    import torch

    from mm.bench.memory import MIB, available_mib

    def best(work: object, repeats: int = 4) -> float:
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            work()  # type: ignore[operator]
            seconds.append(time.perf_counter() - begun)
        return min(seconds)

    def rate(dtype: torch.dtype) -> float:
        a = torch.ones(768, 768, dtype=dtype)
        return 2 * 768**3 / best(lambda: a @ a)

    x = torch.ones(8 << 20)
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() * 4 / best(lambda: y.copy_(x))
    z = torch.ones(8)
    launch = best(lambda: [z.add(1) for _ in range(1000)]) / 1000
    fp32 = rate(torch.float32)
    free = available_mib(torch.device("cpu"))
    memory = int(free * MIB) if free < float("inf") else 1 << 40
    return Gpu(
        "cpu", memory, rate(torch.bfloat16), fp32, fp32, bandwidth, bandwidth / 4, 0.1 * GB,
        "measured now", launch_s=launch, measured=True,
    )  # fmt: skip
