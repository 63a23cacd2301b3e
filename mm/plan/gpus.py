"""Devices by the name that a command line gives, and the rates of this machine's CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mm.errors import UserError, did_you_mean
from mm.trainer.data_sheets import GB, GPUS, Gpu

PCIE = {  # bytes a second and direction: 16 lanes of the generation of the data sheet
    "h100": 64 * GB, "h200": 64 * GB, "b200": 64 * GB, "h100pcie": 64 * GB, "h100nvl": 64 * GB,
    "rtx5090": 64 * GB, "gh200": 450 * GB,  # NVLink-C2C
}  # fmt: skip
PCIE_4 = 32 * GB
HOST_MEMORY = 75 * GB  # assumed: 16 channels of DDR5-4800 are 614 GB/s, for 8 devices
DISK = 3 * GB  # assumed: a device's share of local NVMe disks
REACHED = 0.75  # assumed: of both by copies and updates
ASSUMED = "host memory 75 GB/s and NVMe 3 GB/s a device, 75 % of these and of PCIe: assumed"


@dataclass(frozen=True)
class Host:
    """Rates at which one device and its process use their machine, bytes a second.

    Attributes:
        link: between device and host memory, a direction.
        memory: of the host's updates.
        disk: of swap files.
    """

    link: float
    memory: float
    disk: float


def host_of(gpu: Gpu) -> Host:
    """The machine around a device."""
    if gpu.measured:  # the device is the host
        return Host(gpu.bandwidth, gpu.bandwidth, DISK * REACHED)
    return Host(PCIE.get(gpu.name, PCIE_4) * REACHED, HOST_MEMORY * REACHED, DISK * REACHED)


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
