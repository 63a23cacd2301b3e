"""How ZeRO splits networks over processes, and the messages of one step.

Read in DeepSpeed 0.19.8 and measured on two processes (docs/lab-notes.md): stages 1 and 2 sum whole
buckets (all_reduce, no reduce_scatter), stage 3 keeps what it has gathered up to a limit.

N elements, W processes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mm.engine_config import EngineConfig, Place
from mm.plan.networks import Networks
from mm.plan.trace import Trace
from mm.trainer.engine.settings import BUCKET, Where, overlaps

LIVE = 1_000_000_000  # elements that stage 3 keeps gathered
PREFETCH = 50_000_000  # elements that it gathers ahead, in a buffer beside what it copies them into
WIRE = {"fp32": 4, "bf16": 2}  # bytes of an element of `engine.communication.dtype`
NEAR = "all_gather near"  # within `hpz_partition_size` processes
When = Literal["forward", "backward", "last backward", "step"]


@dataclass(frozen=True)
class Zero:
    """How the networks of a stage lie on processes, and how these communicate.

    Attributes:
        stage: of ZeRO.
        world: processes.
        overlap: gradients are summed while the backward still runs.
        bucket, prefetch: elements of a message of gradients, and of weights gathered ahead.
        wire: bytes of a gradient's element on the way; None: those of the weights.
        gathered: bytes of an element of the weights that stage 3 gathers; None: as they lie.
        near: neighbours that hold all weights among them after a forward; 1: none do.
        optimizer, parameters: where masters and states, and slices of the weights lie.
        ema: a moving average of the weights is kept.
        background: saves are written from a copy on the host.
    """

    stage: int
    world: int
    overlap: bool = False
    bucket: int = BUCKET
    prefetch: int = PREFETCH
    wire: int | None = None
    gathered: int | None = None
    near: int = 1
    optimizer: Place = "device"
    parameters: Place = "device"
    ema: bool = False
    background: bool = False

    @classmethod
    def of(
        cls,
        engine: EngineConfig,
        precision: str,
        where: Where,
        ema: bool = False,
        background: bool = False,
    ) -> Zero:
        """As the engine is told."""
        wire = engine.communication
        narrow = WIRE.get(wire.dtype)
        return cls(
            engine.effective_zero_stage,
            where.world,
            overlaps(engine, where),
            wire.bucket_size or BUCKET,
            wire.bucket_size or PREFETCH,
            narrow,
            # DeepSpeed sends weights as gradients under autocast
            narrow if precision == "autocast_bf16" else None,
            wire.hpz_partition_size,
            *engine.offload.places,
            ema,
            background,
        )

    def wire_bytes(self, net: Networks) -> int:
        """Of a gradient's element on the way."""
        return self.wire or net.weight_bytes

    def gathered_bytes(self, net: Networks) -> int:
        """Of a weight's element on the way."""
        return self.gathered or net.weight_bytes

    def bucket_of(self, net: Networks) -> int:
        """Elements of a message of gradients."""
        return min(net.elements, self.bucket)


class Message(NamedTuple):
    """What processes send each other in one step.

    Attributes:
        bytes: of whole messages, together.
        when: beside what it may run.
        calls: how many messages these are.
    """

    kind: str
    bytes: int
    when: When
    calls: int


def messages(net: Networks, zero: Zero, micros: int) -> list[Message]:
    """Those of the networks; the step's own small sums are left out."""
    if zero.world == 1:
        return []
    N, w, wire = net.elements, net.weight_bytes, zero.wire_bytes(net)
    buckets = math.ceil(N / zero.bucket_of(net))
    if zero.stage == 0:
        return [Message("all_reduce", wire * N, "last backward", buckets)]
    if zero.stage < 3:
        each, when = (micros, "backward") if zero.stage == 2 else (1, "last backward")
        summed = Message("all_reduce", wire * N * each, when, buckets * each)
        return [summed, Message("all_gather", w * N, "step", buckets)]
    cut = N - net.persistent
    # what the forward made and the limit let go is gathered again
    again = max(0, cut - LIVE // 2) if cut > LIVE // 2 else 0
    later = NEAR if zero.near > 1 else "all_gather"  # once they were let go
    calls, sent = net.tensors, zero.gathered_bytes(net)
    out = [
        Message("all_gather", sent * cut, "forward", calls),
        Message(later, sent * cut * (micros - 1), "forward", calls * (micros - 1)),
        Message(later, sent * again * micros, "backward", calls * micros),
        Message("all_gather", sent * net.persistent, "step", 1),
        Message("all_gather", (net.still_bytes + net.other_bytes[0]) * micros, "forward", calls),
        Message("reduce_scatter", wire * N * micros, "backward", buckets * micros),
    ]
    return [m for m in out if m.bytes]


def collectives(net: Networks, zero: Zero, micros: int) -> dict[str, int]:
    """Bytes of whole messages of one step by collective."""
    out: Counter[str] = Counter()
    for message in messages(net, zero, micros):
        out[message.kind] += message.bytes
    return dict(out)


def bytes_passed(trace: Trace, micros: int) -> dict[str, int]:
    """Bytes of whole messages of one step between processes that share rows; none without."""
    return {f"rows: {what}": n * micros for what, n in sorted(trace.passed.items())}


def traffic(sizes: dict[str, int], world: int, near: int = 1) -> float:
    """Bytes that each process sends in rings."""

    def share(kind: str) -> float:
        n = near if kind == NEAR else world
        return (n - 1) / n * (2 if kind == "all_reduce" else 1)

    return sum(n * share(kind) for kind, n in sizes.items())
