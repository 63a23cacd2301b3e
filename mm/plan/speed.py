"""Time of a step: every operator at the rate that binds it, the update, and the collectives.

A roofline an operator (Williams et al. 2009): the longest of its arithmetic, its memory traffic and
its launch from Python. Rates are shares of the data sheet's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mm.plan.gpus import Gpu
from mm.plan.networks import Networks
from mm.plan.trace import Trace, Work
from mm.plan.zero import collectives, passed, traffic

PRODUCTS = 0.7  # of the peak that large matrix products reach
MEMORY = 0.8  # of the bandwidth that elementwise operators reach
NETWORK = 0.75  # of a link that rings reach
LATENCY_S = 15e-6  # of one collective, and of each doubling of processes


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what takes them.

    Attributes:
        parts: products, memory, launches, optimizer, network.
        flops: of the model a step and process, without what is made again.
        tokens: a step and process.
    """

    parts: dict[str, float]
    flops: float
    tokens: float
    peak: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def binds(self) -> str:
        """What takes most of the step."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's own operations reach."""
        return self.flops / self.seconds / self.peak


def rate_of(gpu: Gpu, w: Work) -> float:
    """Operations a second at most; float32 outside of tensor cores."""
    if w.dtype in (torch.bfloat16, torch.float16):
        return gpu.bf16
    return gpu.fp32


def operator_times(trace: Trace, gpu: Gpu) -> dict[str, float]:
    """Seconds of one micro-batch by what binds its operators."""
    out = {"products": 0.0, "memory": 0.0, "launches": 0.0}
    for w in trace.work:
        times = {
            "products": w.flops / (rate_of(gpu, w) * (1 if gpu.measured else PRODUCTS)),
            "memory": w.bytes / (gpu.bandwidth * (1 if gpu.measured else MEMORY)),
            "launches": gpu.launch_s,
        }
        most = max(times, key=times.__getitem__)
        out[most] += times[most]
    return out


def network_seconds(
    trace: Trace, net: Networks, gpu: Gpu, stage: int, world: int, per_node: int, micros: int
) -> float:
    """Seconds of the collectives of a step, none of it hidden (``overlap_comm`` is off)."""
    sizes = collectives(net, stage, world, micros) | passed(trace, micros)
    if not sizes:
        return 0.0
    link = gpu.inside if world <= per_node else min(gpu.inside, gpu.outside)
    calls = 2 * net.tensors * micros if stage == 3 else 6
    return traffic(sizes, world) / (link * NETWORK) + calls * LATENCY_S * math.log2(world)


def step_time(
    trace: Trace, net: Networks, gpu: Gpu, stage: int, world: int, per_node: int, micros: int
) -> StepTime:
    """Predict a step.

    Args:
        trace: of one micro-batch.
        per_node: processes of a node.
        micros: micro-batches of a process.
    """
    parts = {k: v * micros for k, v in operator_times(trace, gpu).items()}
    share = net.elements / (world if stage else 1)
    touched = share * (2 * net.state_bytes + 4 + 8) + net.elements * 2 * net.weight_bytes
    parts["optimizer"] = touched / (gpu.bandwidth * (1 if gpu.measured else MEMORY))
    parts["network"] = network_seconds(trace, net, gpu, stage, world, per_node, micros)
    flops = sum(trace.flops("forward", "backward").values()) * micros
    narrow = any(w.dtype in (torch.bfloat16, torch.float16) for w in trace.work if w.flops)
    return StepTime(parts, flops, trace.tokens * micros, gpu.bf16 if narrow else gpu.fp32)
