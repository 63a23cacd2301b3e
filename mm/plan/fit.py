"""What to set for a number of devices: ZeRO stage, rows of a micro-batch, recomputation."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from mm.errors import UserError
from mm.plan.inputs import Assumed, Subject
from mm.plan.memory import memory
from mm.plan.networks import Networks
from mm.plan.plan import RECOMPUTE, Cluster, Division, open_stage, recompute_of, zero_of
from mm.plan.speed import step_time
from mm.plan.trace import Trace
from mm.run import Run

GAIN = 1.02  # speed that a harder setting must add


def propose(
    run: Run, cluster: Cluster, *, index: int = 0, assumed: Assumed | None = None
) -> dict[str, Any]:
    """The fastest predicted setting that fits, the simplest among those of about its speed.

    Micro-batches of one and of two rows are traced; more rows are a straight line from there.

    Returns:
        ``overrides`` of the config, and ``tried``: the best of each (stage, recomputation).
    Raises:
        UserError: nothing fits.
    """
    subject = open_stage(run, cluster, index, assumed)
    own = recompute_of(subject)
    tried: list[dict[str, Any]] = []
    for mode in RECOMPUTE if own is not None else (None,):
        changed = subject.with_recompute(mode) if mode is not None else subject
        for stage in _stages(run, index):
            if stage in (0, 3) or not tried or tried[-1]["recompute"] != mode:
                traced = [changed.trace(changed.batches(n)[0], stage) for n in (1, 2)]
            best = _best(subject, cluster, traced, stage)
            tried.append({"recompute": mode, "zero_stage": stage, **best})
    fitting = [t for t in tried if t["fits"]]
    if not fitting:
        least = min(tried, key=lambda t: t["memory_bytes"])
        raise UserError(
            f"nothing fits {cluster.world} x {cluster.gpu.name}: the least is "
            f"{least['memory_bytes'] / 1e9:.1f} GB a device (ZeRO stage {least['zero_stage']}, "
            f"recompute {least['recompute']}, one row); "
            f"take more nodes: --nodes {cluster.nodes * 2}"
        )
    chosen = fitting[0]  # from simple to hard: no recomputation and low stages first
    for one in fitting[1:]:
        if one["tokens_per_second"] > chosen["tokens_per_second"] * GAIN:
            chosen = one
    return {"chosen": chosen, "overrides": _overrides(chosen, subject, index), "tried": tried}


def _stages(run: Run, index: int) -> list[int]:
    """ZeRO stages that the run's engine and optimizer allow."""
    stage = run.stages[index]
    out = []
    for n in (1, 2, 3, 0):
        if n == 3 and run.engine.compile or n == 0 and run.engine.precision == "bf16":
            continue
        try:
            type(run.engine).model_validate(run.engine.model_dump() | {"zero_stage": n})
        except ValueError:  # offload and hierarchical partitioning need higher ones
            continue
        if stage.optimizer.refusal(n, stage.schedule.shape) is None:
            out.append(n)
    return out


def _best(
    subject: Subject, cluster: Cluster, traced: list[tuple[Trace, Networks]], stage: int
) -> dict[str, Any]:
    """The fastest number of rows that fits; one row where none does."""
    (one, net), (two, _) = traced
    zero = zero_of(subject, cluster, stage)
    batch = getattr(subject.data, "batch_size", 1)
    most = max(
        1, batch * subject.sequence // cluster.world
    )  # the rows of a step are the user's choice
    best: dict[str, Any] = {}
    rows = 1
    while rows <= most:
        cut = Division.of(subject.data, cluster.world // subject.sequence, rows)
        trace = of_rows(one, two, cut.rows)
        held = memory(net, trace, zero, cut.micros)
        time = step_time(trace, net, cluster.gpu, zero, cluster.per_node, cut.micros)
        found = {
            "rows": cut.rows,
            "micro_batches": cut.micros,
            "rows_a_step": cut.batch,
            "memory_bytes": held.total,
            "fits": cluster.fits(held.total, held.host_total),
            "tokens_per_second": time.tokens * cluster.world / time.seconds,
            "mfu": time.mfu,
            "binds": time.binds,
        }
        faster = found["tokens_per_second"] > best.get("tokens_per_second", 0.0) * GAIN
        if not best or (found["fits"] and faster):
            best = found
        rows *= 2
    return best


def of_rows(one: Trace, two: Trace, rows: int) -> Trace:
    """The trace of ``rows`` rows, on the line through those of one and two."""
    line = lambda a, b: a + (b - a) * (rows - 1)
    if len(one.work) == len(two.work):
        work = [
            a._replace(flops=line(a.flops, b.flops), bytes=int(line(a.bytes, b.bytes)))
            for a, b in zip(one.work, two.work, strict=True)
        ]
    else:  # documents that lie otherwise take other calls
        work = [w._replace(flops=w.flops * rows, bytes=w.bytes * rows) for w in one.work]
    sizes = {
        name: int(line(getattr(one, name), getattr(two, name)))
        for name in ("forward_peak", "peak", "peak_released", "tokens")
    }
    saved = {k: int(line(v, two.saved.get(k, v))) for k, v in one.saved.items()}
    passed = {k: int(line(v, two.passed[k])) for k, v in one.passed.items()}
    counters = {"saved": Counter(saved), "passed": Counter(passed)}
    return dataclasses.replace(one, work=work, **counters, **sizes)


def _overrides(chosen: dict[str, Any], subject: Subject, index: int) -> list[str]:
    """Words that make the config what was chosen."""
    words = [f"engine.zero_stage={chosen['zero_stage']}"]
    if chosen["recompute"] is not None:
        words.append(f"model.backbone.recompute={chosen['recompute']}")
    data = f"stages.{index}.data"
    if "micro_batch_size" in type(subject.data).model_fields:
        words.append(f"{data}.micro_batch_size={chosen['rows']}")
        if chosen["rows_a_step"] != subject.data.batch_size:
            words.append(f"{data}.batch_size={chosen['rows_a_step']}")
    return words
