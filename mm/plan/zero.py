"""Memory of one process and bytes of collectives of one step, as DeepSpeed's ZeRO cuts them.

Read in DeepSpeed 0.19.8 and measured on two processes (docs/lab-notes.md): stages 1 and 2 sum whole
buckets (all_reduce, no reduce_scatter), stage 3 keeps what it has gathered up to a limit.

N elements, W processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm.plan.networks import Networks
from mm.plan.trace import Trace

LIVE = 1_000_000_000  # elements that stage 3 keeps gathered
PREFETCH = 50_000_000  # elements that it gathers ahead, in a buffer beside what it copies them into
BUCKET = 200_000_000  # elements summed at once: mm/trainer/engine/deepspeed.py
MASTER = 4  # bytes of a master weight, an element


@dataclass(frozen=True)
class Memory:
    """Bytes of one process when it needs most.

    Attributes:
        phase: when that is.
        parts: weights, gradients, optimizer, activations, logits, buffers.
        phases: total of every phase.
    """

    phase: str
    parts: dict[str, int]
    phases: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(net: Networks, trace: Trace, stage: int, world: int, micros: int, ema: bool) -> Memory:
    """Predict the bytes of tensors of one process.

    Args:
        trace: of one micro-batch.
        micros: micro-batches a step and process.
        ema: a moving average of the weights is kept.
    """
    N, w = net.elements, net.weight_bytes
    cut = world if stage else 1
    states = net.state_bytes + 4 * ema
    bucket = w * min(N, BUCKET)
    whole, part = w * N, w * N // world
    weights = whole + net.frozen_bytes
    optimizer = int(states * N / cut) + (MASTER * N // cut if stage else 0)
    again = whole if micros > 1 else 0  # gradients of the micro-batches before
    acts, made, both = trace.forward_peak, trace.peak_released, trace.peak
    grads_at_peak = max(0, both - made)
    last = w * net.largest
    if stage == 3:
        gathered = w * min(N - net.persistent, LIVE)
        ahead = w * min(N - net.persistent, PREFETCH)
        weights = part + w * net.persistent + net.frozen_bytes
        fixed = {"gradients": part, "buffers": bucket}
        phases = {
            "forward": {**fixed, "activations": acts, "gathered": gathered + ahead},
            "backward": {**fixed, "activations": made, "gathered": gathered},
            "step": {**fixed, "update": part + (MASTER * N // world if w < MASTER else 0)},
        }
    elif stage == 2:
        kept = part if micros > 1 or bucket < whole else 0
        phases = {
            "forward": {"activations": acts, "gradients": part if micros > 1 else 0},
            "backward": {"activations": made, "gradients": kept, "buffers": bucket},
            "step": {"gradients": part, "update": part + (MASTER * N // world if w < 4 else 0)},
        }
        phases["reduce"] = {"gradients": part + last, "buffers": bucket}
    elif stage == 1:
        grads = again or grads_at_peak
        phases = {
            "forward": {"activations": acts, "gradients": again},
            "backward": {"activations": made, "gradients": grads, "buffers": bucket},
            "step": {"gradients": whole, "buffers": bucket},
        }
    else:
        phases = {
            "forward": {"activations": acts, "gradients": again},
            "backward": {"activations": made, "gradients": again or grads_at_peak},
            "step": {"gradients": whole, "buffers": whole if world > 1 else 0},
        }
    fixed = weights + optimizer
    totals = {name: fixed + sum(parts.values()) for name, parts in phases.items()}
    worst = max(totals, key=totals.__getitem__)
    found = phases[worst]
    active = found.get("activations", 0)
    head = min(active, trace.saved.get("head", 0)) if active else 0
    parts = {
        "weights": weights,
        "gradients": found.get("gradients", 0),
        "optimizer": optimizer,
        "activations": active - head,
        "logits": head,
        "gathered weights": found.get("gathered", 0),
        "buffers": found.get("buffers", 0) + found.get("update", 0),
    }
    return Memory(worst, parts, totals)


def collectives(net: Networks, stage: int, world: int, micros: int) -> dict[str, int]:
    """Bytes of whole messages of one step by collective; the step's own small sums are left out."""
    if world == 1:
        return {}
    N, w = net.elements, net.weight_bytes
    if stage == 0:
        return {"all_reduce": w * N}
    if stage < 3:
        return {"all_reduce": w * N * (micros if stage == 2 else 1), "all_gather": w * N}
    cut = N - net.persistent
    # what the forward made and the limit let go is gathered again
    again = max(0, cut - LIVE // 2) if cut > LIVE // 2 else 0
    return {
        "all_gather": w * ((cut + again) * micros + net.persistent),
        "reduce_scatter": w * N * micros,
    }


def passed(trace: Trace, micros: int) -> dict[str, int]:
    """Bytes of whole messages of one step between processes that share rows; none without."""
    return {f"rows: {what}": n * micros for what, n in sorted(trace.passed.items())}


def traffic(sizes: dict[str, int], world: int) -> float:
    """Bytes that each process sends in rings."""
    share = (world - 1) / world
    return sum(n * share * (2 if kind == "all_reduce" else 1) for kind, n in sizes.items())
