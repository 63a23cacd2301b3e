"""Attention in tiles by the C++ kernel: the CPU's flash attention. R rows, T queries, S keys, H
query heads, G key heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.kernels import compiler
from mm.kernels.attention.blocks import Setting

SOURCE = Path(__file__).with_name("flash.cpp")
SERIAL = 1 << 22  # products of a call below which threads cost more than they save


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, a head's numbers side by side; a slice of a wider projection is no copy."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _given(q: Tensor, k: Tensor, v: Tensor, how: Setting) -> tuple[str, list[Any]]:
    """Suffix of the kernel's name, and the arguments that both ways begin with."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (_rows(x, dtype) for x in (q, k, v))
    R, T, H, K = q.shape
    S, G, V = k.shape[1], k.shape[2], v.shape[-1]
    threads = torch.get_num_threads() if R * H * T * S * (K + V) > SERIAL else 1
    sizes = [R, T, S, H, G, K, V, int(how.causal), how.window, threads]
    for x in (q, k, v):
        sizes += x.stride()[:3]
    whole = lambda x: None if x is None else x.to(torch.int32).contiguous()
    real = lambda x: None if x is None else x.to(torch.float32).contiguous()
    numbers = map(whole, (how.document_q, how.document_k, how.prefix_q, how.prefix_k))
    fades = map(real, (how.fade_q, how.fade_k))
    return compiler.SUFFIX[dtype], [
        *(q, k, v, torch.tensor(sizes), float(how.scale), float(how.softcap)),
        *(*numbers, *fades),
    ]


def forward(q: Tensor, k: Tensor, v: Tensor, how: Setting) -> tuple[Tensor, Tensor]:
    """As `blocks.forward`."""
    (R, T, H, _), G = q.shape, k.shape[2]
    with torch.no_grad():
        kind, given = _given(q, k, v, how)
        y = given[0].new_empty(R, T, H, v.shape[-1])
        lse = torch.empty(R * G, H // G, T, 1)
        sink = None if how.sink is None else how.sink.to(torch.float32).contiguous()
        compiler.call(SOURCE, f"flash_{kind}_forward", *given, sink, y, lse)
        return y.to(v.dtype), lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    how: Setting,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    need: Collection[str],
) -> dict[str, Tensor]:
    """As `blocks.backward`."""
    (R, T, H, _), S = q.shape, k.shape[1]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        kind, given = _given(q, k, v, how)
        delta = (y.float() * dy.float()).sum(-1)
        dy = dy.to(given[0].dtype).contiguous()
        out = [given[i].new_empty(x.shape) for i, x in enumerate((q, k, v))]
        fades = [lse.new_zeros(R, n, H) if "fade_q" in need else None for n in (T, S)]
        compiler.call(SOURCE, f"flash_{kind}_backward", *given, lse, delta, dy, *out, *fades)
        made = {n: g.to(x.dtype) for n, g, x in zip("qkv", out, (q, k, v), strict=True)}
        for name, x, grad in zip(
            ("fade_q", "fade_k"), (how.fade_q, how.fade_k), fades, strict=True
        ):
            if grad is not None and x is not None:
                made[name] = grad.to(x.dtype)
        if how.sink is not None and "sink" in need:
            # A sink is a key of value zero: its score's gradient is -p * delta.
            p = (how.sink.float() - lse.view(R, H, T).mT).exp_()
            made["sink"] = -(p * delta).sum((0, 1)).to(how.sink.dtype)
        return made
