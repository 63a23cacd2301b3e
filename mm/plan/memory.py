"""Memory of one process: what lies on its device when it needs most, on the host, and on disk.

Read in DeepSpeed 0.19.8 and measured on two processes (docs/lab-notes.md).

N elements, W processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mm.plan.networks import Networks
from mm.plan.trace import Trace
from mm.plan.zero import LIVE, Zero

MASTER = 4  # bytes of a master weight, and of its gradient on the host, an element
SWAPPED = 4  # sub-groups of the optimizer that DeepSpeed holds in memory while it swaps
SUB_GROUP = 1_000_000_000  # elements of a sub-group, over all processes
PARAMETER_BUFFERS = 5 * 100_000_000  # elements through which slices of weights are swapped

Parts = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        phase: when its device needs most.
        parts: weights, gradients, optimizer, activations, logits, buffers, on the device.
        phases: total of every phase.
        host: by part, in the memory of its machine.
        disk: by part, in `engine.offload.folder`.
    """

    phase: str
    parts: Parts
    phases: Parts
    host: Parts = field(default_factory=dict)
    disk: Parts = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Of the device."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    @property
    def disk_total(self) -> int:
        return sum(self.disk.values())


def memory(net: Networks, trace: Trace, zero: Zero, micros: int) -> Memory:
    """Predict the bytes of tensors of one process.

    Args:
        trace: of one micro-batch.
        micros: micro-batches a step and process.
    """
    constant, host, disk = standing(net, zero)
    phases = (_stage0, _stage1, _stage2, _stage3)[zero.stage](net, trace, zero, micros)
    fixed = sum(constant.values())
    totals = {name: fixed + sum(parts.values()) for name, parts in phases.items()}
    worst = max(totals, key=totals.__getitem__)
    found = phases[worst]
    active = found.get("activations", 0)
    head = min(active, trace.saved.get("head", 0)) if active else 0
    parts = {
        "weights": constant["weights"],
        "gradients": found.get("gradients", 0),
        "optimizer": constant["optimizer"],
        "activations": active - head,
        "logits": head,
        "gathered weights": found.get("gathered", 0),
        "buffers": constant["buffers"] + found.get("buffers", 0) + found.get("update", 0),
    }
    return Memory(worst, parts, totals, host, disk)


def standing(net: Networks, zero: Zero) -> tuple[Parts, Parts, Parts]:
    """What stays from step to step: on the device, on the host, on disk."""
    N, w, W = net.elements, net.weight_bytes, zero.world
    part = w * N // W
    states = net.state_bytes + 4 * zero.ema
    cut = W if zero.stage else 1
    optimizer = int(states * N / cut) + (MASTER * N // cut if zero.stage else 0)
    still = net.still_bytes + net.other_bytes[0]
    weights = net.buffer_bytes
    weights += w * N + still if zero.stage < 3 else w * net.persistent + net.other_bytes[0] // W
    device = {"weights": weights, "optimizer": 0, "buffers": 0}
    host: Parts = {}
    disk: Parts = {}
    if zero.stage == 3:
        slices = {"device": device, "cpu": host, "nvme": disk}[zero.parameters]
        slices["weights"] = slices.get("weights", 0) + part + net.still_bytes // W
        if zero.parameters == "nvme":
            host["swap buffers"] = w * PARAMETER_BUFFERS
    if zero.optimizer == "device":
        device["optimizer"] = optimizer
    else:
        summed = MASTER * N // W
        if zero.stage == 3:
            host["gradients"] = part + (summed if zero.optimizer == "cpu" else 0)
        else:
            more = part if zero.stage == 2 else 0  # each backward is summed, and kept until a step
            host["gradients"] = summed + more
            host["buffers"] = part + w * net.largest
            device["buffers"] = w * net.largest
        if zero.optimizer == "cpu":
            host["optimizer"] = optimizer
        else:
            disk["optimizer"], disk["gradients"] = optimizer, summed
            swapped = SWAPPED * MASTER * min(N, SUB_GROUP) // W
            host["swap buffers"] = host.get("swap buffers", 0) + swapped
    if zero.background:
        host["copies of a save"] = int((MASTER + states) * N / W)
    return device, host, disk


def _stage0(net: Networks, trace: Trace, zero: Zero, micros: int) -> dict[str, Parts]:
    """Gradients become views of the buckets that are sent, unless these have another dtype."""
    whole, wire = net.weight_bytes * net.elements, zero.wire_bytes(net)
    made, alone = trace.peak_released, zero.world == 1
    bucket = 0 if alone else net.weight_bytes * zero.bucket_of(net)
    sent = wire * net.elements if wire != net.weight_bytes and not alone else 0
    again = whole if micros > 1 else 0  # gradients of the micro-batches before
    grads = again or max(0, trace.peak - made)
    phases = {
        "forward": {"activations": trace.forward_peak, "gradients": again},
        "backward": {"activations": made, "gradients": grads},
        "step": {"gradients": whole, "buffers": bucket + sent},
    }
    if zero.overlap and bucket:
        first = wire * zero.bucket_of(net) if sent else 0
        phases["sum"] = {
            "activations": _left(net, trace, zero),
            "gradients": again or bucket,
            "buffers": bucket + first,
        }
    return phases


def _left(net: Networks, trace: Trace, zero: Zero) -> int:
    """Bytes of activations that are there when the first bucket of a backward is full."""
    return int(trace.peak_released * (1 - zero.bucket_of(net) / net.elements))


def _buckets(net: Networks, zero: Zero) -> tuple[int, int]:
    """Bytes of DeepSpeed's buckets at stages 1 and 2, and of copies of one when it is sent."""
    size, w, wire = zero.bucket_of(net), net.weight_bytes, zero.wire_bytes(net)
    sent = w * size + (wire * size if wire != w else 0)
    return w * size * (2 if zero.overlap else 1), sent


def _updates(net: Networks, zero: Zero) -> int:
    """Bytes of gradients in the optimizer's own dtype, beside those that were summed."""
    if zero.optimizer != "device":
        return 0
    part, w = net.elements // zero.world, net.weight_bytes
    return w * part + (MASTER * part if w < MASTER else 0)


def _own(net: Networks, zero: Zero) -> tuple[int, int]:
    """Bytes of sums that this process updates with, and of the place they get in a backward.

    This one holds the parameter at the border whole. Where the host updates neither is there.
    """
    if zero.optimizer != "device":
        return 0, 0
    part = net.weight_bytes * net.elements // zero.world
    return part, part + net.weight_bytes * net.largest


def _stage1(net: Networks, trace: Trace, zero: Zero, micros: int) -> dict[str, Parts]:
    whole = net.weight_bytes * net.elements
    part, own = _own(net, zero)
    buckets, sent = _buckets(net, zero)
    bucket = net.weight_bytes * zero.bucket_of(net)
    again = whole if micros > 1 else 0  # gradients of the micro-batches before
    made = trace.peak_released
    phases = {
        "forward": {"activations": trace.forward_peak, "gradients": again},
        "step": {"gradients": part, "update": _updates(net, zero)},
    }
    if zero.overlap:
        return phases | {
            "backward": {"activations": made, "gradients": again, "buffers": buckets},
            "sum": _sums(net, trace, zero, max(0, again - bucket), own, buckets, sent),
        }
    grads = again or max(0, trace.peak - made)
    return phases | {
        "backward": {"activations": made, "gradients": grads, "buffers": buckets},
        # gradients move into the bucket, and those of this process into a place of their own
        "sum": {
            "gradients": whole - bucket + (max(0, own - bucket) if bucket < whole else 0),
            "buffers": buckets + sent,
        },
    }


def _stage2(net: Networks, trace: Trace, zero: Zero, micros: int) -> dict[str, Parts]:
    part, own = _own(net, zero)
    buckets, sent = _buckets(net, zero)
    before = part if micros > 1 else 0  # sums of the micro-batches before
    return {
        "forward": {"activations": trace.forward_peak, "gradients": before},
        "backward": {
            "activations": trace.peak_released,
            "gradients": before,
            "buffers": buckets,
        },
        "sum": _sums(net, trace, zero, before, own, buckets, sent),
        "step": {"gradients": part, "update": _updates(net, zero)},
    }


def _sums(
    net: Networks, trace: Trace, zero: Zero, before: int, own: int, buckets: int, sent: int
) -> Parts:
    """When a backward needs most, of three moments in which its first two buckets are summed.

    The first is sent; what it gave this process gets a place of its own; the second is sent.

    Args:
        before: bytes of gradients of the micro-batches before.
        own: bytes of that place.
        buckets, sent: as `_buckets`.
    """
    first = zero.bucket_of(net) / net.elements
    moments = [(1, 0, sent), (1, own, 0)]
    if first < 1:
        moments.append((2, own, sent))
    at = [
        {
            "activations": int(trace.peak_released * max(0.0, 1 - n * first)),
            "gradients": before + here,
            "buffers": buckets + copies,
        }
        for n, here, copies in moments
    ]
    return max(at, key=lambda parts: sum(parts.values()))


def _stage3(net: Networks, trace: Trace, zero: Zero, micros: int) -> dict[str, Parts]:
    N, w, wire, W = net.elements, net.weight_bytes, zero.wire_bytes(net), zero.world
    cut = N - net.persistent
    gathered = w * min(cut, LIVE) + min(net.still_bytes, w * LIVE)
    ahead = zero.gathered_bytes(net) * min(cut + net.still_bytes // w, zero.prefetch)
    # let go in a backward, and in a forward what the limit lets go
    near = w * cut // zero.near if zero.near > 1 else 0
    earlier = near if micros > 1 or cut > LIVE // 2 else 0
    fixed = {
        "gradients": w * N // W if zero.optimizer == "device" else 0,
        "buffers": wire * zero.bucket_of(net),
    }
    with_near = lambda n: {**fixed, "buffers": fixed["buffers"] + n}
    active = trace.forward_peak
    return {
        "forward": {
            **with_near(earlier), "activations": active, "gathered": gathered + ahead,
        },
        "backward": {
            **with_near(earlier), "activations": trace.peak_released, "gathered": gathered,
        },
        "step": {**with_near(near), "update": _updates(net, zero)},
    }  # fmt: skip
