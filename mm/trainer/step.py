"""One optimizer step of every network that the objective steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm.batch import Batch, Sum
from mm.objectives.objective import LossTerm
from mm.trainer.log.metrics import CodebookUsage, MetricSum, all_reduce, n_items, tokens_by_modality
from mm.trainer.stage import StageState

COUNT = "count/"  # of a loss, on its way to the host


def optimizer_step(
    stage: StageState,
    step: int,
    batches: Sequence[Batch],
    usage: CodebookUsage,
    modalities: Sequence[str] | None,
    stop: bool,
) -> dict[str, Any]:
    """Forward and backward over all micro-batches, reduce, clip, update. Call on all ranks.

    Args:
        step: steps of the run done before it.
        batches: this rank's micro-batches, on the host.
        usage: histograms of codes, moved by this step.
        modalities: of the vocabulary; None without one.
        stop: this rank was asked to stop.

    Returns:
        Metrics on the host, "stop": how many ranks were asked to, and "stream": what the rows of
        all ranks hold, by the names that the stream counts.
    """
    objective, env, world = stage.objective, stage.env, dist.get_world_size()
    clock = stage.clock
    clock.start()
    if stage.compiled and env.device.type == "cuda":
        # CUDA graphs keep what they gave until the next such mark: gradients of all micro-batches.
        torch.compiler.cudagraph_mark_step_begin()
    scheduled = stage.begin_step(step)
    micros = [objective.corrupt(env.take(b), env.rng, scheduled) for b in batches]
    env.know(micros)
    clock.mark("forward")
    n, facts = _global_counts(stage, batches, micros, modalities, stop)
    clock.mark("communication")
    scales = objective.scales(n)
    factors = {k: scales[k] / n[k].clamp_min(1e-12) for k in n}
    row: dict[str, Any] = {}
    by_network: dict[str, MetricSum] = {}
    for term in objective.terms(micros, stage.nets, env):
        clock.mark("forward")
        engine = stage.engines[term.network]
        metrics = by_network.setdefault(term.network, MetricSum())
        metrics.add_losses(term.losses)
        loss = world * torch.stack([factors[k] * s for k, s in term.losses.items()]).sum()
        if not term.step:
            engine.backward(loss)
            clock.mark("backward")
            continue
        # Losses are reduced BEFORE the last backward: if their global sum is not finite, this
        # backward makes every gradient NaN on every rank, so that all of them skip the step, at
        # each ZeRO stage, without asking the host.
        metrics.aux = stage.nets.take(term.network).aux
        metrics.reduce()
        clock.mark("communication")
        total = torch.stack([factors[k] * s for k, s in metrics.losses.items()]).sum()
        engine.backward(loss * torch.where(torch.isfinite(total), 1.0, float("nan")), last=True)
        clock.mark("backward")
        device = _device_metrics(term, metrics, total, n) | usage.update(metrics.aux) | facts
        row |= _update(stage, step, term.network, metrics, device)
        del by_network[term.network]
    if stage.nets.carried is not None:
        stage.nets.carried.commit(applied=math.isfinite(row.get("optim/grad_norm", 0.0)))
    return row


def _device_metrics(
    term: LossTerm, metrics: MetricSum, total: Tensor, n: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Global losses, with their counts, and scalar aux of one network, () each."""
    named = "loss/total" if term.network == "model" else f"loss/{term.network}_total"
    out = {f"loss/{k}": s / n[k].clamp_min(1e-12) for k, s in metrics.losses.items()}
    out |= {COUNT + k: n[k] for k in metrics.losses}
    out[named] = total
    return out | {f"aux/{k}": s.mean() for k, s in metrics.aux.items() if s.total.dim() == 0}


def _update(
    stage: StageState, step: int, network: str, metrics: MetricSum, device: dict[str, Tensor]
) -> dict[str, Any]:
    """Step one network. The only device-to-host copy of the step is the one `tolist` here."""
    engine = stage.engines[network]
    norm = engine.reduce()
    stage.clock.mark("communication")
    if norm is not None:
        device["norm"] = norm
    flat = torch.cat([t.detach().double().reshape(-1) for t in device.values()]).tolist()
    host: dict[str, Any] = {}
    for key, t in device.items():
        values, flat = flat[: t.numel()], flat[t.numel() :]
        host[key] = values if t.dim() else values[0]
    for key in [key for key in host if key.startswith(COUNT)]:
        if host.pop(key) == 0:  # a loss without targets is absent: 0 would read as perfect
            del host[f"loss/{key.removeprefix(COUNT)}"]
    lr = engine.set_lr(stage.lr_factor(step))
    stage.env.before_update()
    applied, norm_before = engine.step(host.pop("norm", None))
    after = getattr(engine.raw, "after_step", None)
    if applied and metrics.aux and after is not None:
        with torch.no_grad():
            after({k: Sum(s.total, s.count) for k, s in metrics.aux.items()})
    if applied:
        stage.averages.follow(network)
    stage.clock.mark("optimizer")
    prefix = "optim" if network == "model" else f"optim/{network}"
    return host | {f"{prefix}/lr": lr, f"{prefix}/grad_norm": norm_before}


def _global_counts(
    stage: StageState,
    batches: Sequence[Batch],
    micros: Sequence[Batch],
    modalities: Sequence[str] | None,
    stop: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Denominators of all losses, and facts for the log, over micro-batches and ranks.

    One collective.
    """
    each = [stage.objective.counts(b) for b in micros]
    names = sorted({k for counts in each for k in counts})
    mine = [torch.stack([c[k].float() for c in each if k in c]).sum() for k in names]
    batches = batches if stage.env.leads else ()  # what several share counts once
    tokens = tokens_by_modality(batches, len(modalities or ()))
    host = torch.cat([tokens, torch.tensor([float(n_items(batches)), float(stop)])])
    rows = torch.tensor(list(getattr(stage.stream, "counts", {}).values()), dtype=torch.float64)
    rows = rows * stage.env.leads
    *reduced, seen, held = all_reduce(
        [*mine, *(t.to(stage.env.device, non_blocking=True) for t in (host, rows))]
    )
    total, facts = seen[:-2].sum(), {"stop": seen[-1], "stream": held}
    if modalities is not None:
        facts |= {
            f"tokens/{m}_share": seen[i] / total.clamp_min(1)
            for i, m in enumerate(modalities, start=1)
        }
        facts["tokens/step"] = total
        targets = {m: reduced[names.index(m)] for m in modalities if m in names}
        whole = torch.stack([*targets.values()]).sum().clamp_min(1e-12) if targets else total
        facts |= {f"targets/{m}_share": count / whole for m, count in targets.items()}
    else:
        facts["items/step"] = seen[-2]
    return dict(zip(names, reduced, strict=True)), facts
