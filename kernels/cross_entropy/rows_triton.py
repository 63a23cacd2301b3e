"""The two passes of `linear_cross_entropy` over a chunk of logits in Triton.

One program a token, its row read once. P tokens, C classes of the chunk.
"""

# Triton's stubs do not know that what is given is a constant.
# pyright: reportArgumentType=false
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from mm.kernels.cross_entropy import Rows, Running

BLOCK = 2048
NARROW = True  # arithmetic is in float32 either way


@triton.jit
def _capped(x, softcap, CAP: tl.constexpr):
    """Soft-capped logits and their slope; tanh from exp of a value <= 0."""
    if CAP:
        e = tl.exp(-2.0 * tl.abs(x) / softcap)
        bent = (1.0 - e) / (1.0 + e)
        return tl.where(x < 0, -softcap * bent, softcap * bent), 1.0 - bent * bent
    else:
        return x, x


@triton.jit
def _absorb_kernel(
    logits, target, lse, own, at, C, softcap, CAP: tl.constexpr, KEEP: tl.constexpr, B: tl.constexpr
):
    p = tl.program_id(0).to(tl.int64)
    t = tl.load(target + p) - at
    row = logits + p * C
    top = tl.load(lse + p)
    total = tl.where(top == -float("inf"), 0.0, 1.0)
    found = tl.load(own + p)
    for c in range(0, C, B):
        n = c + tl.arange(0, B)
        x = tl.load(row + n, mask=n < C, other=-float("inf")).to(tl.float32)
        if CAP:
            x = tl.where(n < C, _capped(x, softcap, CAP)[0], -float("inf"))
        if KEEP:
            tl.store(row + n, x, mask=n < C)
        new = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = new
        found += tl.sum(tl.where((n == t) & (n < C), x, 0.0), 0)
    tl.store(lse + p, top + tl.log(total))
    tl.store(own + p, found)


@triton.jit
def _gradient_kernel(
    logits, target, lse, all_P, own_P, at, C, softcap, CAP: tl.constexpr, B: tl.constexpr
):
    p = tl.program_id(0).to(tl.int64)
    t = tl.load(target + p) - at
    row = logits + p * C
    end, everything, own = tl.load(lse + p), tl.load(all_P + p), tl.load(own_P + p)
    for c in range(0, C, B):
        n = c + tl.arange(0, B)
        x = tl.load(row + n, mask=n < C, other=0.0).to(tl.float32)
        x, slope = _capped(x, softcap, CAP)
        g = everything * tl.exp(x - end) - tl.where(n == t, own, 0.0)
        if CAP:
            g = g * slope
        tl.store(row + n, g, mask=n < C)


def absorb(logits: Tensor, at: int, softcap: float, run: Running, keep: bool) -> None:
    """`mm.kernels.cross_entropy.Passes.absorb`, in float32."""
    P, C = logits.shape
    if P:
        _absorb_kernel[(P,)](
            logits, run.target, run.lse, run.own, at, C, softcap, softcap > 0, keep, BLOCK
        )


def gradient(logits: Tensor, at: int, softcap: float, rows: Rows, kept: bool) -> Tensor:
    """`mm.kernels.cross_entropy.Passes.gradient`, in float32."""
    logits = logits.clone() if kept else logits
    P, C = logits.shape
    if P:
        wide = (rows.all.to(torch.float32).contiguous(), rows.own.to(torch.float32).contiguous())
        _gradient_kernel[(P,)](
            logits, rows.target, rows.lse, *wide, at, C, softcap, softcap > 0, BLOCK
        )
    return logits
