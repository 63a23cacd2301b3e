"""Gated activation.

D width of a row.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.op import Op

KINDS = ("silu", "gelu_tanh")


@Op
def glu(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu_tanh"] = "silu") -> Tensor:
    """Return ``activation(gate) * up``.

    Args:
        gate: `(..., D)` any float dtype; computed in float32 or wider.
        up: `(..., D)` any float dtype.
        activation: "silu" (SwiGLU) or "gelu_tanh" (GeGLU, Griffin), the tanh form.
    Returns:
        `(..., D)` in the dtype of ``gate``.
    Source: Shazeer 2020 (arXiv:2002.05202), eq. 6.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    x = gate.to(wide)
    y = F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")
    return (y * up.to(wide)).to(gate.dtype)


@Op
def glu_halves(x: Tensor, activation: Literal["silu", "gelu_tanh"] = "silu") -> Tensor:
    """`glu` of the halves of one tensor, whose gradient is one tensor, too.

    Args:
        x: `(..., 2 D)` gates, then what they scale; any float dtype, computed in float32 or wider.
        activation: as of `glu`.
    Returns:
        `(..., D)` in the dtype of ``x``.
    """
    gate, up = x.chunk(2, dim=-1)
    return glu.implementations["reference"][0](gate, up, activation)


def _why_not(way: str, gate: Tensor, up: Tensor, *rest: Any, **kw: Any) -> str | None:
    pair = (gate.dtype, up.dtype)
    mixed = gate.dtype != up.dtype and pair != (torch.bfloat16, torch.float32)
    return f"no kernel for {pair}" if mixed else None


def rows(x: Tensor) -> tuple[Tensor, int]:
    """Return ``x`` and the stride of its rows; a half of a wider tensor needs no copy."""
    D = x.shape[-1]
    if x.is_contiguous():
        return x, D
    flat = (
        x.dim() >= 2
        and x.stride(-1) == 1
        and all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))
    )
    return (x, x.stride(-2)) if flat else (x.contiguous(), D)


def _arguments(gate: Tensor, up: Tensor, kind: str, *rest: Any) -> tuple[Any, ...]:
    (g, g_stride), (u, u_stride) = rows(gate), rows(up)
    D = gate.shape[-1]
    sizes = (gate.numel() // max(D, 1), D, g_stride, u_stride)
    return KINDS.index(kind), g, u, *rest, *sizes


register_kernel(
    glu,
    "y",
    lambda gate, up, activation: gate.new_empty(gate.shape),
    saved="gate up activation",
    gradients="gate up",
    strided="gate up",
    why_not=_why_not,
    cpp="glu",
    arguments=_arguments,
    typed=2,
    triton="glu_triton",
)
register_kernel(
    glu_halves,
    "y",
    lambda x, activation: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    saved="x activation",
    gradients="x",
    strided="x",
    triton="halves_triton",
)
