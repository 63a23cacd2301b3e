"""First-order recurrence over time. B rows, T tokens, D channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.kernels import compiler
from mm.kernels.op import Op

_SOURCE = Path(__file__).with_name("scan.cpp")


@Op
def linear_scan(
    a_BTD: Tensor, b_BTD: Tensor, reset_BT: Tensor | None = None, initial_BD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a_t * h_{t-1} + b_t`` over each row and channel.

    Args:
        a_BTD: `(B, T, D)` decays, any float dtype; accumulated in float32 or wider.
        b_BTD: `(B, T, D)` inputs.
        reset_BT: `(B, T)` bool: here ``h_t = b_t``, whatever came before (a document begins); None
            = nowhere.
        initial_BD: `(B, D)` state before the first token; None = zeros.
    Returns:
        all states `(B, T, D)` and the last one `(B, D)`, both in float32 or wider.
    Source: Martin & Cundy 2018 (arXiv:1709.04057), eq. 5.
    """
    wide = torch.promote_types(b_BTD.dtype, torch.float32)
    B, T, D = b_BTD.shape
    h = initial_BD.to(wide) if initial_BD is not None else b_BTD.new_zeros(B, D, dtype=wide)
    if T == 0:
        return b_BTD.to(wide), h
    # unbind, not [:, t]: the backward of an index writes a whole zero tensor a step, which makes
    # the loop quadratic.
    resets = reset_BT.unbind(1) if reset_BT is not None else [None] * T
    states = []
    for a, b, reset in zip(a_BTD.to(wide).unbind(1), b_BTD.to(wide).unbind(1), resets, strict=True):
        before = h if reset is None else h.masked_fill(reset[:, None], 0)
        decay = a if reset is None else a.masked_fill(reset[:, None], 0)
        h = decay * before + b
        states.append(h)
    return torch.stack(states, 1), h


def _why_not(
    a_BTD: Tensor, b_BTD: Tensor, reset_BT: Tensor | None = None, initial_BD: Tensor | None = None
) -> str | None:
    return compiler.why_not(_SOURCE, a_BTD, b_BTD, initial_BD)


@linear_scan.register("cpp", _why_not)
def _cpp(
    a_BTD: Tensor, b_BTD: Tensor, reset_BT: Tensor | None = None, initial_BD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(b_BTD.dtype, torch.float32)
    B, T, D = b_BTD.shape
    if T == 0:
        zero = b_BTD.new_zeros(B, D, dtype=wide)
        return b_BTD.to(wide), zero if initial_BD is None else initial_BD.to(wide)
    initial = initial_BD.to(wide).contiguous() if initial_BD is not None else None
    reset = reset_BT.contiguous() if reset_BT is not None else None
    h = torch.ops.mm.linear_scan(
        a_BTD.to(wide).contiguous(), b_BTD.to(wide).contiguous(), reset, initial
    )
    return h, h[:, -1]


def _call(name: str, like: Tensor, *tensors: Tensor | None) -> None:
    compiler.call(_SOURCE, f"scan_{compiler.SUFFIX[like.dtype]}_{name}", *tensors, *like.shape)


def _forward(a: Tensor, b: Tensor, reset: Tensor | None, initial: Tensor | None) -> Tensor:
    h = torch.empty_like(b)
    _call("forward", b, a, b, reset, initial, h)
    return h


def _backward(
    a: Tensor, h: Tensor, reset: Tensor | None, initial: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    da, db = torch.empty_like(a), torch.empty_like(a)
    dinitial = a.new_empty(a.shape[0], a.shape[2] if initial is not None else 0)
    _call(
        "backward", h, a, h, reset, initial, grad, da, db, dinitial if initial is not None else None
    )
    return da, db, dinitial


_forward_op = torch.library.custom_op(
    "mm::linear_scan",
    _forward,
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor? reset, Tensor? initial) -> Tensor",
)
_backward_op = torch.library.custom_op(
    "mm::linear_scan_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor a, Tensor h, Tensor? reset, Tensor? initial, Tensor grad)"
    " -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(a: Tensor, b: Tensor, reset: Tensor | None, initial: Tensor | None) -> Tensor:
    return torch.empty_like(b)


@_backward_op.register_fake
def _(
    a: Tensor, h: Tensor, reset: Tensor | None, initial: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rest = a.new_empty(a.shape[0], a.shape[2] if initial is not None else 0)
    return torch.empty_like(a), torch.empty_like(a), rest


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, reset, initial = inputs
    ctx.save_for_backward(a, output, reset, initial)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, h, reset, initial = ctx.saved_tensors
    da, db, dinitial = torch.ops.mm.linear_scan_backward(a, h, reset, initial, grad)
    return da, db, None, dinitial if initial is not None else None


_forward_op.register_autograd(_grads, setup_context=_setup)
