"""One of several processes that share rows: every layer whole and in slices, forward and backward.

``python sequence_ranks.py RANK SIZE STORE OUT DTYPE NAME..``: rank 0 writes what it found to OUT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import laws
import torch
import torch.distributed as dist
from torch import Tensor

from mm.layout import Doc, Layout
from mm.model.context import Ctx
from mm.model.layer import Layer
from mm.shard import Shard

T = 32
# Documents that end inside slices, at their ends, that fill several, and rows that end in padding.
ROWS = ([11, 9, 12], [29], [32], [8, 8, 5, 11], [3, 2, 6])


def layout(times: int = 1) -> Layout:
    """The rows, each document ``times`` as long."""
    rows = [[Doc(n * times, modality=None) for n in row] for row in ROWS]
    return Layout.from_rows(rows, T * times)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this process hands to collectives, one entry a call."""
    sent: list[int] = []
    plain = {name: getattr(dist, name) for name in COLLECTIVES}

    def count(name: str) -> Any:
        def call(out: Tensor, given: Tensor, *args: Any, **kw: Any) -> Any:
            sent.append(given.numel() * given.element_size())
            return plain[name](out, given, *args, **kw)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, count(name))
    try:
        yield sent
    finally:
        for name, f in plain.items():
            setattr(dist, name, f)


COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")


def compare(
    layer: Layer, whole: Layout, dtype: torch.dtype, rank: int, size: int
) -> dict[str, Any]:
    """Greatest differences of outputs and gradients, relative to the greatest of the whole."""
    g = torch.Generator().manual_seed(3)
    B, n = whole.shape
    real = (whole.fields.document > 0)[..., None]
    x = torch.randn(B, n, laws.D, generator=g, dtype=torch.float64).to(dtype)
    x = torch.where(real, x, 0.0)
    w = torch.where(real, torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype), 0.0)
    ids = (x[..., :1] > 0).int()
    mask = laws.mask_of(layer)
    given = x.clone().requires_grad_()
    y = layer(given, Ctx(whole, mask, ids, seed=5)).y
    (y * w).sum().backward()
    expected = {k: p.grad.clone() for k, p in layer.named_parameters() if p.grad is not None}
    assert given.grad is not None
    expected |= {"y": y.detach(), "x": given.grad}
    layer.zero_grad()
    shard, own = Shard.of(whole, rank, size, dist.group.WORLD)
    part = shard.slice(x).clone().requires_grad_()
    with counted() as sent:
        out = layer(part, Ctx(own, mask, shard.slice(ids), seed=5, shard=shard)).y
        (out * shard.slice(w)).sum().backward()
    assert part.grad is not None
    found = {"y": out.detach(), "x": part.grad}
    for name, p in layer.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(grad)
        found[name] = grad
    layer.zero_grad()
    worst: dict[str, float] = {}
    for name, value in expected.items():
        mine = found[name]
        if name in ("x", "y"):
            top = torch.where(real, value, 0.0).abs().max()
            at = shard.slice(real)
            off = torch.where(at, mine - shard.slice(value), 0.0).abs().max()
        else:
            top, off = value.abs().max(), (mine - value).abs().max()
        off = (off / top.clamp_min(1e-3)).double().nan_to_num(nan=1e9)
        dist.all_reduce(off, dist.ReduceOp.MAX)
        worst[name] = float(off)
    name = max(worst, key=lambda k: worst[k])
    return {"name": name, "off": worst[name], "bytes": sum(sent), "calls": len(sent)}


def refusal(layer: Layer, size: int) -> str | None:
    from mm.model.sequence import why_not

    return why_not(layer, size, T)


def main() -> None:
    rank, size, store, out, dtype, *names = sys.argv[1:]
    rank, size = int(rank), int(size)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    whole = layout()
    for name in names or laws.VARIANTS:
        layer = laws.build(name, getattr(torch, dtype))
        why = refusal(layer, size)
        told[name] = (
            {"refused": why} if why else compare(layer, whole, getattr(torch, dtype), rank, size)
        )
    if rank == 0:
        with open(out, "w") as file:
            json.dump(told, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
