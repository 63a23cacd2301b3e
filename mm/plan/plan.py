"""A plan of a run: everything predicted from the config, with the error that each figure has.

B rows of a micro-batch, T tokens of a row, W processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mm.errors import UserError
from mm.plan.gpus import GIB, Gpu
from mm.plan.inputs import CPU, Assumed, Subject, documents, open_subject
from mm.plan.networks import Networks
from mm.plan.speed import step_time
from mm.plan.trace import Trace
from mm.plan.zero import Memory, collectives, memory, passed
from mm.run import Run
from mm.trainer.engine.deepspeed import resolve_precision

CONTEXT = int(1.5 * GIB)  # of CUDA and NCCL, a device
SPARE = 0.06  # that the allocator loses between its blocks
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LENGTHS = (512, 1024, 2048)  # traced to find the longest
RECOMPUTE = ("none", "selective", "full")

# What the predictions were off by; benchmarks/plan.py, docs/lab-notes.md
ERRORS = {
    "memory": "live tensor bytes: within 1 % of steps measured on CPUs (2 processes, stages 0-3); "
    "the allocator's and CUDA's own share is an assumption",
    "collectives": "bytes: within 0.1 % of what was counted; the step's own sums are left out",
    "speed": "rates of data sheets, never compared with a GPU: take it as a factor of 2",
    "cpu": "a busy CPU took 0.65 to 2.3 times the predicted step: take it as a factor of 2.5",
}


@dataclass(frozen=True)
class Cluster:
    """Devices that a run is planned for."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    def fits(self, total: int) -> bool:
        """Whether tensors of so many bytes fit one device."""
        if self.gpu.name == "cpu":
            return total * self.per_node <= self.gpu.memory
        return total * (1 + SPARE) + CONTEXT <= self.gpu.memory


@dataclass(frozen=True)
class Division:
    """How the rows of a step lie on processes."""

    rows: int  # of a micro-batch
    micros: int
    batch: int  # rows of a step, over all
    note: str = ""

    @classmethod
    def of(cls, data: Any, world: int, rows: int | None = None) -> Division:
        """As the config says; where it has fewer rows than processes, one micro-batch each."""
        batch = getattr(data, "batch_size", 1)
        asked = rows or getattr(data, "micro_batch_size", None)
        if batch % world:
            size = asked or max(1, batch // world)
            micros = max(1, round(batch / (world * size)))
            whole = world * size * micros
            note = f"batch_size {batch} does not divide over {world} processes: planned: {whole}"
            return cls(size, micros, whole, note)
        mine = batch // world
        size = min(asked or mine, mine)
        while mine % size:
            size -= 1
        return cls(size, mine // size, batch)


def make_plan(
    run: Run,
    cluster: Cluster,
    *,
    index: int = 0,
    assumed: Assumed | None = None,
    longest: bool = True,
    variants: bool = True,
) -> dict[str, Any]:
    """Predict a stage of a run on a cluster.

    Args:
        index: of the stage.
        assumed: what stands for data that are not there.
        longest: also look for the longest sequence that fits.
        variants: also trace the other recomputations.
    Raises:
        UserError: data or stage are not there, or the config cannot be built.
    """
    subject = open_stage(run, cluster, index, assumed)
    stage = run.engine.effective_zero_stage
    ema = run.stages[index].ema is not None
    division = Division.of(subject.data, cluster.world // subject.sequence)
    batch = subject.batches(division.rows)[0]
    trace, net = subject.trace(batch, stage)
    B, T = batch.layout.shape
    lengths = document_lengths(batch)
    held = memory(net, trace, stage, cluster.world, division.micros, ema)
    out: dict[str, Any] = {
        "predicted": True,
        "config": run.name,
        "stage": index,
        "gpu": dataclasses.asdict(cluster.gpu),
        "nodes": cluster.nodes,
        "gpus": cluster.world,
        "precision": subject.precision,
        "zero_stage": stage,
        "parameters": {"total": sum(net.by_part.values()), "by_part": net.by_part},
        "batch": {
            "rows": B,
            "micro_batches": division.micros,
            "rows_a_step": division.batch,
            "tokens_a_row": T,
            "tokens": trace.tokens,
            "documents": len(lengths),
            "mean_document": sum(lengths) / max(1, len(lengths)),
            "longest_document": max(lengths, default=0),
            "note": division.note,
            "assumed": assumed is not None,
            "slices": subject.sequence,
        },
        "flops_a_token": flops_a_token(trace),
        "memory": describe(held, cluster),
        "fits": cluster.fits(held.total),
        "recompute": _recompute(subject, batch, stage, cluster, division, ema, trace, held)
        if variants
        else [],
        "collectives": collectives(net, stage, cluster.world, division.micros)
        | passed(trace, division.micros),
        "step": describe_step(trace, net, cluster, stage, division),
        "by_nodes": by_nodes(subject, trace, net, cluster, stage, division, ema),
        "without_formula": sorted(trace.unknown),
        "errors": ERRORS,
    }
    if bytes_of_state := subject.state_bytes(T):
        out["state_bytes_a_sequence"] = bytes_of_state
    if longest:
        out["longest_sequence"] = longest_sequence(subject, cluster, stage, ema)
    return out


def open_stage(run: Run, cluster: Cluster, index: int, assumed: Assumed | None) -> Subject:
    """The stage as the cluster would train it. Raises UserError."""
    if not 0 <= index < len(run.stages):
        raise UserError(f"--stage {index}: the config has stages 0 to {len(run.stages) - 1}")
    asked = run.engine.precision
    on_cpu = cluster.gpu.name == "cpu"
    precision = resolve_precision(asked, CPU) if on_cpu or asked != "auto" else "autocast_bf16"
    if cluster.world % (size := run.engine.sequence):
        raise UserError(
            f"engine.sequence {size} does not divide {cluster.world} devices: plan for a multiple "
            f"of it, such as --gpus-per-node {size}"
        )
    return open_subject(run, index, precision, assumed)


def document_lengths(batch: Any) -> list[int]:
    """Tokens of each document of a micro-batch."""
    document = batch.layout.fields.document.flatten().long()
    return [n for n in torch.bincount(document)[1:].tolist() if n] if document.numel() else []


def flops_a_token(trace: Trace) -> dict[str, Any]:
    """Operations a token by part, forward and backward; made again apart."""
    tokens = max(1, trace.tokens)
    phases = {
        phase: {k: v / tokens for k, v in trace.flops(phase).items() if v}
        for phase in ("forward", "backward", "recompute")
    }
    sums = {phase: sum(parts.values()) for phase, parts in phases.items()}
    return {**{f"{k}_by_part": v for k, v in phases.items()}, **sums} | {
        "total": sums["forward"] + sums["backward"]
    }


def describe(held: Memory, cluster: Cluster) -> dict[str, Any]:
    """Memory of one device for the JSON."""
    reserve = 0 if cluster.gpu.name == "cpu" else int(held.total * SPARE) + CONTEXT
    return {
        "total_bytes": held.total,
        "reserve_bytes": reserve,
        "device_bytes": cluster.gpu.memory,
        "peak_in": held.phase,
        "by_part": held.parts,
        "by_phase": held.phases,
    }


def describe_step(
    trace: Trace, net: Networks, cluster: Cluster, stage: int, division: Division
) -> dict[str, Any]:
    """Time of a step for the JSON."""
    found = step_time(
        trace, net, cluster.gpu, stage, cluster.world, cluster.per_node, division.micros
    )
    return {
        "seconds": found.seconds,
        "by_part": found.parts,
        "binds": found.binds,
        "mfu": found.mfu,
        "tokens_per_second": found.tokens * cluster.world / found.seconds,
        "tokens_per_second_a_gpu": found.tokens / found.seconds,
    }


def by_nodes(
    subject: Subject, trace: Trace, net: Networks, cluster: Cluster, stage: int,
    division: Division, ema: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """The same run on 1 to thousands of devices: as many rows a step where they can be cut."""
    rows = []
    counts = NODES if cluster.gpu.name != "cpu" else NODES[:4]
    for nodes in sorted({*counts, cluster.nodes}):
        here = dataclasses.replace(cluster, nodes=nodes)
        if here.world % subject.sequence:
            continue
        groups = here.world // subject.sequence
        cut = Division.of(subject.data, groups, division.rows)
        held = memory(net, trace, stage, here.world, cut.micros, ema)
        rows.append(
            {
                "nodes": nodes,
                "gpus": here.world,
                "rows_a_step": groups * division.rows * cut.micros,
                "memory_bytes": held.total,
                "fits": here.fits(held.total),
                **describe_step(trace, net, here, stage, cut),
            }
        )
    return rows


def _recompute(
    subject: Subject, batch: Any, stage: int, cluster: Cluster, division: Division, ema: bool,
    trace: Trace, held: Memory,
) -> list[dict[str, Any]]:  # fmt: skip
    """Memory and operations under each recomputation of the backbone."""
    own = recompute_of(subject)
    rows = []
    for mode in RECOMPUTE if own is not None else ():
        if mode != own:
            trace, net = subject.with_recompute(mode).trace(batch, stage)
            held = memory(net, trace, stage, cluster.world, division.micros, ema)
        work = trace.flops("recompute")
        rows.append(
            {
                "mode": mode,
                "chosen": mode == own,
                "activation_bytes": trace.forward_peak,
                "memory_bytes": held.total,
                "fits": cluster.fits(held.total),
                "flops_made_again": sum(work.values()) / max(1, trace.tokens),
            }
        )
    return rows


def recompute_of(subject: Subject) -> str | None:
    """How the backbone recomputes; None of a network without one."""
    return getattr(getattr(subject.run.model, "backbone", None), "recompute", None)


def longest_sequence(
    subject: Subject, cluster: Cluster, stage: int, ema: bool
) -> dict[str, Any] | None:
    """Tokens of the longest single document that fits, one row a device.

    Three lengths are traced; memory between and beyond them is a polynomial of degree 2. None where
    the model takes no other length.
    """
    if subject.vocabulary is None:
        return None
    points: list[tuple[int, int]] = []
    for n in LENGTHS:
        try:
            trace, net = subject.trace(documents(1, n, n, subject.vocabulary), stage)
        except (UserError, ValueError, RuntimeError):
            return None
        points.append((n, memory(net, trace, stage, cluster.world, 1, ema).total))
    curve = parabola(points)
    low, high = 0, 1 << 26
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cluster.fits(int(curve(middle))) else (low, middle - 1)
    return {"tokens": low, "traced": dict(points), "beyond": low > 4 * LENGTHS[-1]}


def parabola(points: list[tuple[int, int]]) -> Callable[[float], float]:
    """The polynomial through three points, never falling."""
    (a, fa), (b, fb), (c, fc) = points
    ab, bc = (fb - fa) / (b - a), (fc - fb) / (c - b)
    bend = max(0.0, (bc - ab) / (c - a))
    # Newton's form from the two longest lengths on
    return lambda x: fc + (x - c) * (max(0.0, bc) + bend * (x - b))
