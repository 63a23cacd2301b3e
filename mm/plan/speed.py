"""Time of a step: every operator at the rate that binds it, the update, and the collectives.

A roofline an operator (Williams et al. 2009): the longest of its arithmetic, its memory traffic and
its launch from Python. Rates are shares of the data sheet's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mm.plan.gpus import host_of
from mm.plan.networks import Networks
from mm.plan.trace import Trace, Work
from mm.plan.zero import NEAR, When, Zero, bytes_passed, messages, traffic
from mm.trainer.data_sheets import Gpu

PRODUCTS = 0.7  # of the peak that large matrix products reach
MEMORY = 0.8  # of the bandwidth that elementwise operators reach
NETWORK = 0.75  # of a link that rings reach
LATENCY_S = 15e-6  # of one collective, and of each doubling of processes


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what takes them.

    Attributes:
        parts: products, memory, launches, optimizer, offload, network (what nothing hides).
        flops: of the model a step and process, without what is made again.
        tokens: a step and process.
        hidden: of the network, behind forward and backward.
    """

    parts: dict[str, float]
    flops: float
    tokens: float
    peak: float
    hidden: float = 0.0

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


def operator_times(trace: Trace, gpu: Gpu, *phases: str) -> dict[str, float]:
    """Seconds of one micro-batch, or of some phases of it, by what binds its operators."""
    out = {"products": 0.0, "memory": 0.0, "launches": 0.0}
    for w in trace.work:
        if phases and w.phase not in phases:
            continue
        times = {
            "products": w.flops / (rate_of(gpu, w) * (1 if gpu.measured else PRODUCTS)),
            "memory": w.bytes / (gpu.bandwidth * (1 if gpu.measured else MEMORY)),
            "launches": gpu.launch_s,
        }
        most = max(times, key=times.__getitem__)
        out[most] += times[most]
    return out


def beside(trace: Trace, gpu: Gpu, micros: int) -> dict[When, float]:
    """Seconds of a step that compute, by when."""
    seconds = lambda *phases: sum(operator_times(trace, gpu, *phases).values())
    backward = seconds("backward", "recompute")
    return {
        "forward": seconds("forward") * micros,
        "backward": backward * micros,
        "last backward": backward,
        "step": 0.0,
    }


def network_seconds(
    net: Networks, gpu: Gpu, zero: Zero, per_node: int, micros: int, compute: dict[When, float]
) -> tuple[float, float]:
    """Seconds of a step's messages: those that the step waits for, and those that compute hides.

    With overlap messages of gradients, and at ZeRO stage 3 those of weights, run beside what
    computes; the last bucket is full only when a backward ends, so nothing hides it. On a CPU
    nothing is hidden: gloo takes the cores.
    """
    total, hides = 0.0, zero.overlap and not gpu.measured
    exposed: dict[When, float] = dict.fromkeys(compute, 0.0)
    tails: dict[When, float] = dict.fromkeys(compute, 0.0)
    for kind, size, when, calls in messages(net, zero, micros):
        seconds = message_seconds(kind, size, calls, gpu, zero, per_node)
        total += seconds
        exposed[when] += seconds
        if kind in ("all_reduce", "reduce_scatter"):
            tails[when] += seconds * zero.bucket_of(net) / net.elements
    if hides:
        exposed = {
            when: max(seconds - compute[when], tails[when]) for when, seconds in exposed.items()
        }
    waits = sum(exposed.values())
    return waits, total - waits


def message_seconds(kind: str, size: int, calls: int, gpu: Gpu, zero: Zero, per_node: int) -> float:
    """Seconds of ``calls`` messages of ``size`` bytes together."""
    world = zero.near if kind == NEAR else zero.world
    link = gpu.inside if world <= per_node else min(gpu.inside, gpu.outside)
    sent = traffic({kind: size}, zero.world, zero.near)
    return sent / (link * NETWORK) + calls * LATENCY_S * math.log2(world)


def rows_seconds(trace: Trace, gpu: Gpu, world: int, per_node: int, micros: int) -> float:
    """Seconds of what processes that share rows pass to each other; the layers wait for it."""
    link = gpu.inside if world <= per_node else min(gpu.inside, gpu.outside)
    return traffic(bytes_passed(trace, micros), world) / (link * NETWORK)


def optimizer_seconds(net: Networks, gpu: Gpu, zero: Zero) -> float:
    """Seconds of an update, by the device or by the host: it is bound by memory."""
    share = net.elements / (zero.world if zero.stage else 1)
    touched = share * (2 * net.state_bytes + 4 + 8)
    cast = net.elements * 2 * net.weight_bytes / (gpu.bandwidth * _reached(gpu))
    if zero.optimizer == "device":
        return touched / (gpu.bandwidth * _reached(gpu)) + cast
    return touched / host_of(gpu).memory + cast


def offload_seconds(net: Networks, gpu: Gpu, zero: Zero, micros: int) -> float:
    """Seconds of copies between device, host and disk; nothing of it is hidden."""
    host, part = host_of(gpu), net.elements / zero.world
    w, copied, swapped = net.weight_bytes, 0.0, 0.0
    if zero.optimizer != "device":
        # gradients go down and weights up; sums of earlier micro-batches up and down again
        again = micros - 1 if zero.stage != 1 else 0
        copied += part * w * (1 + 1 + 2 * again)
    if zero.optimizer == "nvme":
        swapped += part * (2 * (4 + net.state_bytes) + 2 * 4)  # gradients are written and read
    if zero.parameters != "device":
        gathers = sum(m.bytes for m in messages(net, zero, micros) if "gather" in m.kind)
        size = gathers / zero.world if zero.world > 1 else net.elements * w * micros
        copied += size
        swapped += size + part * w if zero.parameters == "nvme" else 0.0
    return copied / host.link + swapped / host.disk


def _reached(gpu: Gpu) -> float:
    return 1 if gpu.measured else MEMORY


def step_time(
    trace: Trace, net: Networks, gpu: Gpu, zero: Zero, per_node: int, micros: int
) -> StepTime:
    """Predict a step.

    Args:
        trace: of one micro-batch.
        per_node: processes of a node.
        micros: micro-batches of a process.
    """
    parts = {k: v * micros for k, v in operator_times(trace, gpu).items()}
    parts["optimizer"] = optimizer_seconds(net, gpu, zero)
    if offload := offload_seconds(net, gpu, zero, micros):
        parts["offload"] = offload
    waits, hidden = network_seconds(net, gpu, zero, per_node, micros, beside(trace, gpu, micros))
    parts["network"] = waits + rows_seconds(trace, gpu, zero.world, per_node, micros)
    flops = sum(trace.flops("forward", "backward").values()) * micros
    narrow = any(w.dtype in (torch.bfloat16, torch.float16) for w in trace.work if w.flops)
    peak = gpu.bf16 if narrow else gpu.fp32
    return StepTime(parts, flops, trace.tokens * micros, peak, hidden)
