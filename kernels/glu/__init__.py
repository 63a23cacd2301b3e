"""Gated activation. D width of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import compiler
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


def _why_not(gate: Tensor, up: Tensor, activation: str = "silu") -> str | None:
    pair = (gate.dtype, up.dtype)
    if gate.dtype != up.dtype and pair != (torch.bfloat16, torch.float32):
        return f"no kernel for {pair}"
    return compiler.why_not(_SOURCE, gate, up)


@glu.register("cpp", _why_not)
def _cpp(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    return torch.ops.mm.glu(gate, up, _KINDS.index(activation))


def _rows(x: Tensor) -> tuple[Tensor, int]:
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


def _name(gate: Tensor, up: Tensor, way: str) -> str:
    return f"glu_{compiler.SUFFIX[gate.dtype]}_{compiler.SUFFIX[up.dtype]}_{way}"


def _forward(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype)
    (g, s_g), (u, s_u) = _rows(gate), _rows(up)
    D = gate.shape[-1]
    compiler.call(
        _SOURCE, _name(gate, up, "forward"), kind, g, u, y, gate.numel() // max(D, 1), D, s_g, s_u
    )
    return y


def _backward(gate: Tensor, up: Tensor, grad: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    dg, du = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
    (g, s_g), (u, s_u) = _rows(gate), _rows(up)
    D = gate.shape[-1]
    name = _name(gate, up, "backward")
    compiler.call(
        _SOURCE, name, kind, g, u, grad.contiguous(), dg, du, gate.numel() // max(D, 1), D, s_g, s_u
    )
    return dg, du


_forward_op = torch.library.custom_op(
    "mm::glu", _forward, mutates_args=(), schema="(Tensor gate, Tensor up, int kind) -> Tensor"
)
_backward_op = torch.library.custom_op(
    "mm::glu_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor gate, Tensor up, Tensor grad, int kind) -> (Tensor, Tensor)",
)


@_forward_op.register_fake
def _(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    return gate.new_empty(gate.shape)


@_backward_op.register_fake
def _(gate: Tensor, up: Tensor, grad: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.kind = inputs[2]


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.mm.glu_backward(*ctx.saved_tensors, grad, ctx.kind), None


_forward_op.register_autograd(_grads, setup_context=_setup)
