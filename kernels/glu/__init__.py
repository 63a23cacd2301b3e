"""Gated activation. D width of a row."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import compiler
from mm.kernels.fused import fused
from mm.kernels.op import Op

_SOURCE = Path(__file__).with_name("glu.cpp")
_KINDS = ("silu", "gelu_tanh")


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


def _refused(gate: Tensor, up: Tensor, activation: str = "silu") -> str | None:
    pair = (gate.dtype, up.dtype)
    if gate.dtype != up.dtype and pair != (torch.bfloat16, torch.float32):
        return f"no kernel for {pair}"
    return None


def rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` and the stride of its rows; a half of a wider tensor needs no copy."""
    D = x.shape[-1]
    if x.is_contiguous():
        return x, D
    flat = (
        x.dim() >= 2
        and x.stride(-1) == 1
        and all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))
    )
    return (x, x.stride(-2)) if flat else (x.contiguous(), D)


def _outputs(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    return gate.new_empty(gate.shape)


def _gradients(gate: Tensor, up: Tensor, kind: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _call(way: str, gate: Tensor, up: Tensor, kind: int, *tensors: Tensor) -> None:
    (g, s_g), (u, s_u) = rows(gate), rows(up)
    D = gate.shape[-1]
    name = f"glu_{compiler.SUFFIX[gate.dtype]}_{compiler.SUFFIX[up.dtype]}_{way}"
    compiler.call(_SOURCE, name, kind, g, u, *tensors, gate.numel() // max(D, 1), D, s_g, s_u)


_OPS = fused(
    "glu",
    _outputs,
    _gradients,
    saved=lambda gate, up, kind, y: (gate, up, kind),
    wrt=("gate", "up"),
    cpp=(partial(_call, "forward"), partial(_call, "backward")),
    triton=f"{__name__}.glu_triton",
)


def _run(way: str, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    return _OPS[way](gate, up, _KINDS.index(activation))


compiler.register(glu, _SOURCE, _run, _refused)
