"""Short depthwise causal convolution inside documents. B rows, T tokens, D channels, C taps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import compiler
from mm.kernels.op import Op

_SOURCE = Path(__file__).with_name("conv.cpp")


@Op
def causal_conv(u_BTD: Tensor, weight_CD: Tensor, bias_D: Tensor, document_BT: Tensor) -> Tensor:
    """Sum each channel over the last C places of its document.

    Args:
        u_BTD: `(B, T, D)` any float dtype; accumulated in float32 or wider.
        weight_CD: `(C, D)`, oldest tap first: the last row weighs the place itself.
        bias_D: `(D,)`.
        document_BT: `(B, T)` int32; taps stop where it changes.
    Returns:
        `(B, T, D)` in the dtype of ``u``.
    Source: Dauphin et al. 2017 (arXiv:1612.08083), section 2; per document as in De et al. 2024
    (arXiv:2402.19427).
    """
    wide = torch.promote_types(u_BTD.dtype, torch.float32)
    u, w = u_BTD.to(wide), weight_CD.to(wide)
    y = u * w[-1] + bias_D.to(wide)
    for j in range(1, min(w.shape[0], u.shape[1])):
        # Selected, not multiplied: the neighbour document may hold inf.
        same = (document_BT[:, j:] == document_BT[:, :-j])[..., None]
        y = y + F.pad(u[:, :-j].masked_fill(~same, 0), (0, 0, j, 0)) * w[-1 - j]
    return y.to(u_BTD.dtype)


def _why_not(u_BTD: Tensor, weight_CD: Tensor, bias_D: Tensor, document_BT: Tensor) -> str | None:
    if document_BT.dtype != torch.int32:
        return f"documents are {document_BT.dtype}, not int32"
    return compiler.why_not(_SOURCE, u_BTD, weight_CD, bias_D)


@causal_conv.register("cpp", _why_not)
def _cpp(u_BTD: Tensor, weight_CD: Tensor, bias_D: Tensor, document_BT: Tensor) -> Tensor:
    wide = torch.promote_types(u_BTD.dtype, torch.float32)
    weight, bias = weight_CD.to(wide).contiguous(), bias_D.to(wide).contiguous()
    return torch.ops.mm.causal_conv(u_BTD, weight, bias, document_BT.contiguous())


def _rows(u: Tensor) -> tuple[Tensor, int]:
    """``u`` and its row stride; a half of a wider projection needs no copy."""
    if u.stride(2) == 1 and u.stride(0) == u.shape[1] * u.stride(1):
        return u, u.stride(1)
    return u.contiguous(), u.shape[2]


def _forward(u: Tensor, weight: Tensor, bias: Tensor, document: Tensor) -> Tensor:
    y = torch.empty(u.shape, dtype=u.dtype)
    rows, stride = _rows(u)
    name = f"conv_{compiler.SUFFIX[u.dtype]}_forward"
    compiler.call(_SOURCE, name, rows, weight, bias, document, y, *u.shape, weight.shape[0], stride)
    return y


def _backward(
    u: Tensor, weight: Tensor, document: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    du, dw, db = (
        torch.empty(u.shape, dtype=u.dtype),
        torch.empty_like(weight),
        weight.new_empty(u.shape[2]),
    )
    rows, stride = _rows(u)
    name = f"conv_{compiler.SUFFIX[u.dtype]}_backward"
    compiler.call(
        _SOURCE,
        name,
        rows,
        weight,
        document,
        grad.contiguous(),
        du,
        dw,
        db,
        *u.shape,
        weight.shape[0],
        stride,
    )
    return du, dw, db


_forward_op = torch.library.custom_op(
    "mm::causal_conv",
    _forward,
    mutates_args=(),
    schema="(Tensor u, Tensor weight, Tensor bias, Tensor document) -> Tensor",
)
_backward_op = torch.library.custom_op(
    "mm::causal_conv_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor u, Tensor weight, Tensor document, Tensor grad) -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(u: Tensor, weight: Tensor, bias: Tensor, document: Tensor) -> Tensor:
    return u.new_empty(u.shape)


@_backward_op.register_fake
def _(u: Tensor, weight: Tensor, document: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), torch.empty_like(weight), weight.new_empty(u.shape[2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, weight, _, document = inputs
    ctx.save_for_backward(u, weight, document)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.mm.causal_conv_backward(*ctx.saved_tensors, grad), None


_forward_op.register_autograd(_grads, setup_context=_setup)
