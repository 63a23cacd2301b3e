"""A plan of a run: everything predicted from the config, with the error that each figure has.

B rows of a micro-batch, T tokens of a row, W processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mm.errors import UserError
from mm.plan.gpus import ASSUMED
from mm.plan.inputs import CPU, Assumed, Subject, documents, open_subject
from mm.plan.memory import Memory, memory
from mm.plan.networks import Networks
from mm.plan.speed import step_time
from mm.plan.trace import Trace
from mm.plan.zero import Zero, bytes_passed, collectives
from mm.run import Run
from mm.trainer.data_sheets import GIB, Gpu
from mm.trainer.engine.deepspeed import resolve_precision
from mm.trainer.engine.settings import Where, refuse

CONTEXT = int(1.5 * GIB)  # of CUDA and NCCL, a device
SPARE = 0.06  # that the allocator loses between its blocks
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LENGTHS = (512, 1024, 2048)  # traced to find the longest
RECOMPUTE = ("none", "selective", "full")

# What the predictions were off by; benchmarks/plan.py, docs/lab-notes.md
ERRORS = {
    "memory": "live tensor bytes: within 1 % of steps measured on CPUs (2 processes, stages 0-3, "
    "offload, overlap), within 10 % with buckets smaller than the model; "
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

    @property
    def where(self) -> Where:
        """What a network trains on."""
        return Where("cpu" if self.gpu.name == "cpu" else "cuda", self.world)

    def fits(self, total: int, host: int = 0) -> bool:
        """Whether tensors of so many bytes fit one device.

        ``host``: bytes on the host, which count where it is the device.
        """
        if self.gpu.name == "cpu":
            return (total + host) * self.per_node <= self.gpu.memory
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
    launches: Literal["no", "eager", "compiled"] = "no",
) -> dict[str, Any]:
    """Predict a stage of a run on a cluster.

    Args:
        index: of the stage.
        assumed: what stands for data that are not there.
        longest: also look for the longest sequence that fits.
        variants: also trace the other recomputations.
        launches: also count the kernels that one layer of each kind launches.
    Raises:
        UserError: data or stage are not there, or the config cannot be built.
    """
    subject = open_stage(run, cluster, index, assumed)
    stage, zero = run.engine.effective_zero_stage, zero_of(subject, cluster)
    division = Division.of(subject.data, cluster.world // subject.sequence)
    batch = subject.batches(division.rows)[0]
    trace, net = subject.trace(batch, stage)
    B, T = batch.layout.shape
    lengths = document_lengths(batch)
    held = memory(net, trace, zero, division.micros)
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
        "fits": cluster.fits(held.total, held.host_total),
        "recompute": _recompute(subject, batch, cluster, division, trace, held) if variants else [],
        "collectives": collectives(net, zero, division.micros)
        | bytes_passed(trace, division.micros),
        "step": describe_step(trace, net, cluster, zero, division),
        "by_nodes": by_nodes(subject, trace, net, cluster, division),
        "rates_of_host": ASSUMED,
        "without_formula": sorted(trace.unknown),
        "errors": ERRORS,
    }
    if bytes_of_state := subject.state_bytes(T):
        out["state_bytes_a_sequence"] = bytes_of_state
    if launches != "no":
        out["launches_a_layer"] = launches_a_layer(subject, batch, launches == "compiled")
    if longest:
        out["longest_sequence"] = longest_sequence(subject, cluster)
    return out


def open_stage(run: Run, cluster: Cluster, index: int, assumed: Assumed | None) -> Subject:
    """The stage as the cluster would train it. Raises UserError."""
    if not 0 <= index < len(run.stages):
        raise UserError(f"--stage {index}: the config has stages 0 to {len(run.stages) - 1}")
    asked = run.engine.precision
    on_cpu = cluster.where.device == "cpu"
    precision = resolve_precision(asked, CPU) if on_cpu or asked != "auto" else "autocast_bf16"
    if cluster.world % (size := run.engine.sequence):
        raise UserError(
            f"engine.sequence {size} does not divide {cluster.world} devices: plan for a multiple "
            f"of it, such as --gpus-per-node {size}"
        )
    refuse(run.engine, precision, cluster.where)
    return open_subject(run, index, precision, assumed)


def zero_of(subject: Subject, cluster: Cluster, stage: int | None = None) -> Zero:
    """How the engine lays the stage's networks on a cluster, perhaps at another ZeRO stage."""
    run = subject.run
    ema = run.stages[subject.index].ema is not None
    precision = subject.precision
    zero = Zero.of(run.engine, precision, cluster.where, ema, run.checkpoints.background)
    return zero if stage is None else dataclasses.replace(zero, stage=stage)


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
        "host_bytes": held.host_total,
        "host_bytes_a_node": held.host_total * cluster.per_node,
        "disk_bytes_a_node": held.disk_total * cluster.per_node,
        "peak_in": held.phase,
        "by_part": held.parts,
        "by_phase": held.phases,
        "host_by_part": held.host,
        "disk_by_part": held.disk,
    }


def describe_step(
    trace: Trace, net: Networks, cluster: Cluster, zero: Zero, division: Division
) -> dict[str, Any]:
    """Time of a step for the JSON."""
    found = step_time(trace, net, cluster.gpu, zero, cluster.per_node, division.micros)
    return {
        "seconds": found.seconds,
        "by_part": found.parts,
        "network_hidden_seconds": found.hidden,
        "binds": found.binds,
        "mfu": found.mfu,
        "tokens_per_second": found.tokens * cluster.world / found.seconds,
        "tokens_per_second_a_gpu": found.tokens / found.seconds,
    }


def by_nodes(
    subject: Subject, trace: Trace, net: Networks, cluster: Cluster, division: Division
) -> list[dict[str, Any]]:
    """The same run on 1 to thousands of devices: as many rows a step where they can be cut."""
    rows = []
    near = subject.run.engine.communication.hpz_partition_size
    counts = NODES if cluster.gpu.name != "cpu" else NODES[:4]
    for nodes in sorted({*counts, cluster.nodes}):
        here = dataclasses.replace(cluster, nodes=nodes)
        if here.world % subject.sequence or here.world % near:
            continue
        groups = here.world // subject.sequence
        cut = Division.of(subject.data, groups, division.rows)
        zero = zero_of(subject, here)
        held = memory(net, trace, zero, cut.micros)
        rows.append(
            {
                "nodes": nodes,
                "gpus": here.world,
                "rows_a_step": groups * division.rows * cut.micros,
                "memory_bytes": held.total,
                "host_bytes_a_node": held.host_total * here.per_node,
                "fits": here.fits(held.total, held.host_total),
                **describe_step(trace, net, here, zero, cut),
            }
        )
    return rows


def _recompute(
    subject: Subject, batch: Any, cluster: Cluster, division: Division, trace: Trace, held: Memory
) -> list[dict[str, Any]]:
    """Memory and operations under each recomputation of the backbone."""
    own = recompute_of(subject)
    rows = []
    for mode in RECOMPUTE if own is not None else ():
        if mode != own:
            zero = zero_of(subject, cluster)
            trace, net = subject.with_recompute(mode).trace(batch, zero.stage)
            held = memory(net, trace, zero, division.micros)
        work = trace.flops("recompute")
        rows.append(
            {
                "mode": mode,
                "chosen": mode == own,
                "activation_bytes": trace.forward_peak,
                "memory_bytes": held.total,
                "fits": cluster.fits(held.total, held.host_total),
                "flops_made_again": sum(work.values()) / max(1, trace.tokens),
            }
        )
    return rows


def recompute_of(subject: Subject) -> str | None:
    """How the backbone recomputes; None of a network without one."""
    return getattr(getattr(subject.run.model, "backbone", None), "recompute", None)


def launches_a_layer(subject: Subject, batch: Any, compiled: bool) -> list[dict[str, Any]]:
    """Kernels of a training step by kind of layer, for the JSON."""
    from mm.plan.launches import one_of_each, step_launches

    run = subject.run
    if getattr(run.model, "backbone", None) is not None:
        model = run.model.model_copy(update={"backbone": one_of_each(run.model.backbone)})
        run = run.model_copy(update={"model": model})
    found, _ = step_launches(run, subject.index, subject.vocabulary, batch, compiled)
    return [
        {"layer": x.name, "forward": x.forward, "backward": x.backward, "eager": x.eager}
        | ({"compiled": x.compiled, "graphs": x.graphs} if compiled else {})
        for x in found
    ]


def longest_sequence(subject: Subject, cluster: Cluster) -> dict[str, Any] | None:
    """Tokens of the longest single document that fits, one row a device.

    Three lengths are traced; memory between and beyond them is a polynomial of degree 2. None where
    the model takes no other length.
    """
    if subject.vocabulary is None:
        return None
    points: list[tuple[int, int]] = []
    zero, host = zero_of(subject, cluster), 0
    for n in LENGTHS:
        try:
            trace, net = subject.trace(documents(1, n, n, subject.vocabulary), zero.stage)
        except (UserError, ValueError, RuntimeError):
            return None
        held = memory(net, trace, zero, 1)
        points.append((n, held.total))
        host = held.host_total
    curve = parabola(points)
    low, high = 0, 1 << 26
    while low < high:
        middle = (low + high + 1) // 2
        found = cluster.fits(int(curve(middle)), host)
        low, high = (middle, high) if found else (low, middle - 1)
    return {"tokens": low, "traced": dict(points), "beyond": low > 4 * LENGTHS[-1]}


def parabola(points: list[tuple[int, int]]) -> Callable[[float], float]:
    """The polynomial through three points, never falling."""
    (a, fa), (b, fb), (c, fc) = points
    ab, bc = (fb - fa) / (b - a), (fc - fb) / (c - b)
    bend = max(0.0, (bc - ab) / (c - a))
    # Newton's form from the two longest lengths on
    return lambda x: fc + (x - c) * (max(0.0, bc) + bend * (x - b))
