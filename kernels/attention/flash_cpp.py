"""Attention in tiles by the C++ kernel: the CPU's flash attention.

R rows, T queries, S keys, H query heads, G key heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.kernels import compiler
from mm.kernels.attention.spec import MaskSpec, ScoreSpec

SOURCE = Path(__file__).with_name("flash.cpp")
SERIAL = 1 << 22  # products of a call below which threads cost more than they save


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, a head's numbers side by side; a slice of a wider projection is no copy."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _given(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec
) -> tuple[str, list[Any]]:
    """Suffix of the kernel's name, and the arguments that both ways begin with."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (_rows(x, dtype) for x in (q, k, v))
    R, T, H, K = q.shape
    S, G, V = k.shape[1], k.shape[2], v.shape[-1]
    threads = torch.get_num_threads() if R * H * T * S * (K + V) > SERIAL else 1
    sizes = [R, T, S, H, G, K, V, int(mask.causal), mask.window or 0, threads]
    for x in (q, k, v):
        sizes += x.stride()[:3]
    whole = lambda x: None if x is None else x.to(torch.int32).contiguous()
    real = lambda x: None if x is None else x.to(torch.float32).contiguous()
    of_queries_and_keys = (mask.document_RT, mask.document_RS, mask.prefix_RT, mask.prefix_RS)
    numbers = map(whole, of_queries_and_keys)
    fades = map(real, (score.fade_RTH, score.fade_RSH))
    scale, softcap = float(score.factor(K)), float(score.softcap or 0)
    return compiler.SUFFIX[dtype], [
        *(q, k, v, torch.tensor(sizes), scale, softcap, *numbers, *fades)
    ]


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec
) -> tuple[Tensor, Tensor]:
    """`mm.kernels.attention.blocks.forward`."""
    (R, T, H, _), G = q.shape, k.shape[2]
    with torch.no_grad():
        kind, given = _given(q, k, v, mask, score)
        y = given[0].new_empty(R, T, H, v.shape[-1])
        lse = torch.empty(R * G, H // G, T, 1)
        sink = None if score.sink_H is None else score.sink_H.to(torch.float32).contiguous()
        compiler.call(SOURCE, f"flash_{kind}_forward", *given, sink, y, lse)
        return y.to(v.dtype), lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec,
    y: Tensor, lse: Tensor, dy: Tensor, need: Collection[str],
) -> dict[str, Tensor]:  # fmt: skip
    """`mm.kernels.attention.blocks.backward`."""
    (R, T, H, _), S = q.shape, k.shape[1]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        kind, given = _given(q, k, v, mask, score)
        delta = (y.float() * dy.float()).sum(-1)
        dy = dy.to(given[0].dtype).contiguous()
        out = [given[i].new_empty(x.shape) for i, x in enumerate((q, k, v))]
        fades = [lse.new_zeros(R, n, H) if "fade_RTH" in need else None for n in (T, S)]
        compiler.call(SOURCE, f"flash_{kind}_backward", *given, lse, delta, dy, *out, *fades)
        made = {n: g.to(x.dtype) for n, g, x in zip("qkv", out, (q, k, v), strict=True)}
        for name, grad in zip(("fade_RTH", "fade_RSH"), fades, strict=True):
            if grad is not None:
                made[name] = grad.to(getattr(score, name).dtype)
        if score.sink_H is not None and "sink_H" in need:
            # A sink is a key of value zero: its score's gradient is -p * delta.
            p = (score.sink_H.float() - lse.view(R, H, T).mT).exp_()
            made["sink_H"] = -(p * delta).sum((0, 1)).to(score.sink_H.dtype)
        return made
