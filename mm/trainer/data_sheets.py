"""Rates of accelerators from their makers' data sheets, dense (not sparse)."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
        _gpu("h100pcie", 80, 756, 378, 51, 2000, 32, 25, "NVIDIA H100 PCIe data sheet, 2023"),
        _gpu("h100nvl", 94, 835, 417, 60, 3900, 300, 25, "NVIDIA H100 NVL data sheet, 2024"),
        _gpu("gh200", 96, 989.4, 494.7, 67, 4000, 450, 50, "NVIDIA GH200 data sheet, 2023"),
        _gpu("l40s", 48, 362, 183, 91.6, 864, 32, 25, "NVIDIA L40S data sheet, 2023"),
        _gpu("l40", 48, 181, 90.5, 90.5, 864, 32, 25, "NVIDIA L40 data sheet, 2022"),
        _gpu("l4", 24, 121, 60, 30.3, 300, 32, 12.5, "NVIDIA L4 data sheet, 2023"),
        _gpu("a40", 48, 149.7, 74.8, 37.4, 696, 32, 25, "NVIDIA A40 data sheet, 2020"),
        _gpu("a10", 24, 125, 62.5, 31.2, 600, 32, 12.5, "NVIDIA A10 data sheet, 2021"),
        _gpu("rtxa6000", 48, 154.8, 77.4, 38.7, 768, 32, 12.5, "NVIDIA RTX A6000 data sheet, 2020"),
        _gpu("rtx5090", 32, 209.5, 104.8, 104.8, 1792, 64, 3, "NVIDIA RTX Blackwell paper, 2025"),
        _gpu("rtx4090", 24, 165.2, 82.6, 82.6, 1008, 32, 3, "NVIDIA Ada architecture paper, 2022"),
        _gpu("rtx3090", 24, 71, 35.6, 35.6, 936, 32, 3, "NVIDIA GA102 architecture paper, 2021"),
    )
}


def like(name: str) -> Gpu | None:
    """The device that a driver calls ``name``; None of one that is not here.

    By whole words, the longest match first: an L40 is no L4, an RTX A1000 no A100.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    if "laptop" in words:
        return None  # another chip under the same number
    joined = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    found = sorted(joined & GPUS.keys(), key=len)
    return GPUS[found[-1]] if found else None
