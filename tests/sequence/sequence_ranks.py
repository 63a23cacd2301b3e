"""One of several gloo processes that share rows: layers whole and in slices, both ways.

``python sequence_ranks.py RANK WORLD STORE JOBS OUT``. A job is {"do", "size", ...}: the first
``size`` processes do it, and rank 0 writes what all of them found, in the order of the jobs.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import laws
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Full, Mask, Prefix, Window
from mm.mask_expression import parse_mask
from mm.model import sequence
from mm.model.context import Ctx
from mm.model.layer import Layer
from mm.registry import MIXERS
from mm.shard import Shard

T = 32
# Over several slices, from one slice into the next, and of named fields.
MASKS: dict[str, Mask] = {
    "prefix": Prefix(),
    "window": Window(11),
    "full": Full(),
    "expression": parse_mask("causal & ~(item != 0 & q.prefix) | same_prefix"),
}
# Documents that end inside slices, at their ends, that fill several, and rows that end in padding.
ROWS = ([11, 9, 12], [29], [32], [8, 8, 5, 11], [3, 2, 6])
COLLECTIVES = ("all_to_all_single",)
DRAWS = 8


def _attention(kind: str = "attention", **settings: Any) -> Callable[[], Layer]:
    return lambda: MIXERS.parse({"kind": kind, "heads": 4, **settings}).build(laws.D)


# Besides the laws' own ones: of four heads, for four processes; and longer than a slice of 8.
VARIANTS = laws.VARIANTS | {
    "halo of 19": lambda: MIXERS.parse({"kind": "gated_cnn", "conv_size": 20}).build(laws.D),
    "4 heads, 2 of keys": _attention(kv_heads=2, window=9),
    "4 heads, 1 of keys": _attention(kv_heads=1, sinks=True, softcap=5.0),
    "4 heads, forget gate": _attention(forget_gate=True, token_shift=True, out_norm=True),
    **{
        f"4 heads, {p}": _attention(position=p)
        for p in ("alibi", "t5_bias", "urpe", "randomised", "learned")
    },
    **{
        f"4 heads, {kind}": _attention(kind)
        for kind in (
            *("latent_attention", "differential_attention", "path_attention", "cog_attention"),
            *("topk_attention", "combiner", "kv_only", "kv_shift"),
        )
    },
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Layer:
    with mock.patch.dict(laws.VARIANTS, VARIANTS):
        return laws.build(name, dtype)


def layout(times: int = 1) -> Layout:
    """The rows, each document ``times`` as long: a prefix, an item amid it, and what follows."""

    def doc(n: int) -> Doc:
        place = np.arange(n)
        marks = {"prefix": place < 2 * n // 3, "item": (n // 3 <= place) & (place < n // 2)}
        return Doc(n, extra={k: v.astype(np.int32) for k, v in marks.items()})

    return Layout.from_rows([[doc(n * times) for n in row] for row in ROWS], T * times)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this process hands to collectives, one entry a call."""
    sent: list[int] = []
    plain = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(out: Tensor, given: Tensor, *args: Any, **kw: Any) -> Any:
            sent.append(given.numel() * given.element_size())
            return plain[name](out, given, *args, **kw)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, f in plain.items():
            setattr(dist, name, f)


@contextmanager
def restarted() -> Iterator[None]:
    """The fault that peers' users found: states and tails begin anew in every process."""
    from mm.model.mixers.conv import state as conv
    from mm.model.mixers.linear_attention import log_linear
    from mm.model.mixers.ssm import scan

    plain = conv.halo

    def alone(x: Tensor, n: int, shard: Shard) -> tuple[Tensor, Tensor]:
        wide, document = plain(x, n, shard)
        return torch.cat((torch.zeros_like(wide[:, :n]), x), 1), document

    changed = [(conv, "halo", alone)]
    changed += [(m, "carry_over", lambda fresh, *_: fresh()) for m in (scan, log_linear)]
    was = [(module, name, getattr(module, name)) for module, name, _ in changed]
    for module, name, fault in changed:
        setattr(module, name, fault)
    try:
        yield
    finally:
        for module, name, plain_ in was:
            setattr(module, name, plain_)


def alone(layer: Layer, x: torch.Tensor, w: torch.Tensor, ctx: Ctx) -> dict[str, torch.Tensor]:
    """Output, its weighted sum's gradients by name of parameter and `x`, in one process."""
    layer.zero_grad()
    y = layer(x, ctx).y
    (y * w).sum().backward()
    assert x.grad is not None
    found = {k: p.grad.clone() for k, p in layer.named_parameters() if p.grad is not None}
    return found | {"y": y.detach(), "x": x.grad}


def compare(
    layer: Layer,
    times: int,
    dtype: torch.dtype,
    rank: int,
    size: int,
    group: Any,
    fault: bool,
    mask: str | None = None,
) -> dict[str, Any]:
    """Greatest difference of outputs and gradients, relative to the greatest of the whole.

    A gradient whose terms cancel (a factor before a norm) is rounding alone: what a process by
    itself is off from fp64 does not count, twice, for there are two of them.
    """
    whole, g = layout(times), torch.Generator().manual_seed(3)
    real = (whole.fields.document > 0)[..., None]

    def drawn() -> Tensor:
        x = torch.randn(*whole.shape, laws.D, generator=g, dtype=torch.float64)
        return torch.where(real, x, 0.0).to(dtype)

    x, w = drawn(), drawn()
    ids = (x[..., :1] > 0).int()
    sees = laws.mask_of(layer) if mask is None else MASKS[mask]
    given = x.clone().requires_grad_()
    expected = alone(layer, given, w, Ctx(whole, sees, ids, seed=5))
    layer.zero_grad()
    shard, own = Shard.of(whole, rank, size, group)
    part = shard.slice(x).clone().requires_grad_()
    with counted() as sent, restarted() if fault else nullcontext():
        out = layer(part, Ctx(own, sees, shard.slice(ids), seed=5, shard=shard)).y
        (out * shard.slice(w)).sum().backward()
    assert part.grad is not None
    found = {"y": out.detach(), "x": part.grad}
    for name, p in layer.named_parameters():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(found[name], group=group)
    worst: dict[str, float] = {}
    scale: dict[str, float] = {}
    for name, value in expected.items():
        off, mine = value, found[name]
        if name in ("x", "y"):
            value = torch.where(real, value, 0.0)
            mine = torch.where(shard.slice(real), mine, 0.0)
            off = shard.slice(value)
        apart = (mine - off).abs().max().double().nan_to_num(nan=1e9)
        dist.all_reduce(apart, dist.ReduceOp.MAX, group=group)
        scale[name] = float(value.abs().max().clamp_min(1e-3))
        worst[name] = float(apart) / scale[name]
    if dtype == torch.float32 and max(worst.values()) > 1e-5:
        exact = alone(
            layer.double(), x.double().requires_grad_(), w.double(), Ctx(whole, sees, ids, seed=5)
        )
        for name, value in expected.items():
            rounding = float((value - exact[name]).abs().max()) / scale[name]
            worst[name] -= min(2 * rounding, worst[name])
    name = max(worst, key=lambda k: worst[k])
    return {"where": name, "off": worst[name], "bytes": sum(sent), "calls": len(sent)}


def rounding(layer: Layer, rank: int, size: int, group: Any) -> dict[str, float]:
    """In bf16: how far one process and several are from fp64, the parameter that is farthest.

    Norm of the difference over that of the exact gradient, the mean of several draws in logarithms:
    where a layer divides by something small once in a while, single draws say little.
    """
    whole, ids_of = layout(), lambda x: (x[..., :1] > 0).int()
    real = (whole.fields.document > 0)[..., None]
    shard, own = Shard.of(whole, rank, size, group)
    exact_layer, mask = copy.deepcopy(layer).double(), laws.mask_of(layer)
    sums: dict[str, Tensor] = {}
    for seed in range(DRAWS):
        g = torch.Generator().manual_seed(seed)
        x, w = (
            torch.where(real, torch.randn(*whole.shape, laws.D, generator=g), 0.0).bfloat16()
            for _ in "xw"
        )
        ctx = Ctx(whole, mask, ids_of(x), seed=5)
        exact = alone(exact_layer, x.double().requires_grad_(), w.double(), ctx)
        one = alone(layer, x.clone().requires_grad_(), w, ctx)
        layer.zero_grad()
        part = shard.slice(x).clone().requires_grad_()
        out = layer(part, Ctx(own, mask, shard.slice(ids_of(x)), seed=5, shard=shard)).y
        (out * shard.slice(w)).sum().backward()
        for name, p in layer.named_parameters():
            mine = torch.zeros(p.shape) if p.grad is None else p.grad.float()
            dist.all_reduce(mine, group=group)
            norm = exact[name].norm().clamp_min(1e-12)
            far = torch.stack([(t.double() - exact[name]).norm() / norm for t in (one[name], mine)])
            sums[name] = sums.get(name, torch.zeros(2)) + far.clamp_min(1e-6).log().float()
    means = {name: (total / DRAWS).exp() for name, total in sums.items()}
    worst = max(means, key=lambda name: float(means[name][1] / means[name][0]))
    return {"where": worst, "one": float(means[worst][0]), "several": float(means[worst][1])}


def adjoint(rank: int, size: int, group: Any) -> dict[str, float]:
    """Of every collective: how far its backward is from the transpose of its forward."""
    shard, _ = Shard.of(layout(), rank, size, group)
    g = torch.Generator().manual_seed(rank)
    found = {}
    forms = {
        "tokens_to_heads": lambda x: sequence.tokens_to_heads(x, shard),
        "heads_to_tokens": lambda x: sequence.heads_to_tokens(x, shard),
        "shift": lambda x: sequence.shift(x, shard),
        "gather": lambda x: sequence.gather(x, shard),
    }
    for name, f in forms.items():
        x = torch.randn(2, size, size, 3, generator=g, dtype=torch.float64).requires_grad_()
        y = f(x)
        w = torch.randn(y.shape, generator=g, dtype=torch.float64)
        (grad,) = torch.autograd.grad(y, x, w)
        # <y(v), w> = <v, y^T(w)> over all processes, for another v.
        v = torch.randn(x.shape, generator=g, dtype=torch.float64)
        gap = ((f(v) * w).sum() - (v * grad).sum()).detach()
        dist.all_reduce(gap, group=group)
        found[name] = float(gap.abs())
    return found


def order(name: str, group: Any) -> dict[str, Any]:
    """The first parameter whose gradient is not ready in its turn in all processes, in bf16.

    There weights are cast on their way into kernels: that is where an order comes from.
    """
    layer, whole = build(name, torch.bfloat16), Layout.from_rows([[Doc(5), Doc(4)], [Doc(8)]], 9)
    ready: list[str] = []
    for key, p in layer.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, key=key: ready.append(key))
    g = torch.Generator().manual_seed(3)
    x = torch.randn(*whole.shape, laws.D, generator=g).bfloat16().requires_grad_()
    laws.apply(layer, x, whole, seed=5).y.sum().backward()
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, ready, group=group)
    other = [keys for keys in zip(*every, strict=True) if len({*keys}) > 1]
    return {"first": other[0] if other else None, "n": len(ready)}


def do(job: dict[str, Any], rank: int, group: Any) -> Any:
    size = job["size"]
    if job["do"] == "collectives":
        return adjoint(rank, size, group)
    if job["do"] == "order":
        return order(job["name"], group)
    dtype, times = getattr(torch, job["dtype"]), job.get("times", 1)
    layer = build(job["name"], dtype)
    if (why := sequence.why_not(layer, size)) is not None:
        return {"refused": why}
    if job["do"] == "rounding":
        return rounding(layer, rank, size, group)
    fault, mask = job.get("fault", False), job.get("mask")
    try:
        return compare(layer, times, dtype, rank, size, group, fault, mask)
    except UserError as error:  # all processes alike: it does not run under the mask
        return {"refused": str(error)}


def main() -> None:
    rank, world, store, jobs, out = sys.argv[1:]
    rank, world = int(rank), int(world)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    groups = {n: dist.new_group(list(range(n))) for n in (2, 4) if n <= world}
    given = json.loads(Path(jobs).read_text())
    told = [do(job, rank, groups[job["size"]]) if rank < job["size"] else None for job in given]
    if rank == 0:
        Path(out).write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
