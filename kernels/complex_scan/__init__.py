"""First-order recurrence in complex numbers, as real pairs. B rows, T tokens, W complex channels, D
= 2W.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.kernels import compiler
from mm.kernels.op import Op

_SOURCE = Path(__file__).with_name("scan.cpp")


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Complex product of `(..., 2W)` tensors: W real parts, then W imaginary ones."""
    (ar, ai), (br, bi) = a.chunk(2, -1), b.chunk(2, -1)
    return torch.cat((ar * br - ai * bi, ar * bi + ai * br), -1)


@Op
def complex_scan(
    a: Tensor, b_BTD: Tensor, reset_BT: Tensor | None = None, initial_BD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a_t * h_{t-1} + b_t`` over each row and complex channel.

    The last dimension of every tensor holds W real parts, then W imaginary ones.

    Args:
        a: `(B, T, 2W)` decays, or `(2W,)` for one decay at all places; accumulated in float32 or
            wider.
        b_BTD: `(B, T, 2W)` inputs.
        reset_BT: `(B, T)` bool: here ``h_t = b_t``, whatever came before; None = nowhere.
        initial_BD: `(B, 2W)` state before the first token; None = zeros.
    Returns:
        all states `(B, T, 2W)` and the last one `(B, 2W)`, both in float32 or wider.
    Source: Orvieto et al. 2023, LRU (arXiv:2303.06349), eq. 4 (constant a); Katsch 2023, GateLoop
        (arXiv:2311.01927), section 3 (a of the token).
    """
    wide = torch.promote_types(b_BTD.dtype, torch.float32)
    B, T, D = b_BTD.shape
    h = initial_BD.to(wide) if initial_BD is not None else b_BTD.new_zeros(B, D, dtype=wide)
    if T == 0:
        return b_BTD.to(wide), h
    # unbind, not [:, t]: the backward of an index writes a whole zero tensor a step.
    resets = reset_BT.unbind(1) if reset_BT is not None else [None] * T
    decays = a.to(wide).unbind(1) if a.dim() == 3 else [a.to(wide)] * T
    states = []
    for decay, b, reset in zip(decays, b_BTD.to(wide).unbind(1), resets, strict=True):
        before = h if reset is None else h.masked_fill(reset[:, None], 0)
        h = multiply(decay, before) + b
        states.append(h)
    return torch.stack(states, 1), h


def _why_not(
    a: Tensor, b_BTD: Tensor, reset_BT: Tensor | None = None, initial_BD: Tensor | None = None
) -> str | None:
    return compiler.why_not(_SOURCE, a, b_BTD, initial_BD)


@complex_scan.register("cpp", _why_not)
def _cpp(
    a: Tensor, b_BTD: Tensor, reset_BT: Tensor | None = None, initial_BD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(b_BTD.dtype, torch.float32)
    B, T, D = b_BTD.shape
    if T == 0:
        zero = b_BTD.new_zeros(B, D, dtype=wide)
        return b_BTD.to(wide), zero if initial_BD is None else initial_BD.to(wide)
    initial = initial_BD.to(wide).contiguous() if initial_BD is not None else None
    reset = reset_BT.contiguous() if reset_BT is not None else None
    h = torch.ops.mm.complex_scan(
        a.to(wide).contiguous(), b_BTD.to(wide).contiguous(), reset, initial
    )
    return h, h[:, -1]


def _call(name: str, like: Tensor, a: Tensor, *tensors: Tensor | None) -> None:
    function = f"complex_{compiler.SUFFIX[like.dtype]}_{name}"
    compiler.call(_SOURCE, function, a, *tensors, int(a.dim() == 1), *like.shape)


def _forward(a: Tensor, b: Tensor, reset: Tensor | None, initial: Tensor | None) -> Tensor:
    h = torch.empty_like(b)
    _call("forward", b, a, b, reset, initial, h)
    return h


def _backward(
    a: Tensor, h: Tensor, reset: Tensor | None, initial: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    da, db = torch.empty_like(a), torch.empty_like(h)
    dinitial = a.new_empty(h.shape[0], h.shape[2] if initial is not None else 0)
    last = dinitial if initial is not None else None
    _call("backward", h, a, h, reset, initial, grad.contiguous(), da, db, last)
    return da, db, dinitial


_forward_op = torch.library.custom_op(
    "mm::complex_scan",
    _forward,
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor? reset, Tensor? initial) -> Tensor",
)
_backward_op = torch.library.custom_op(
    "mm::complex_scan_backward",
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
    rest = a.new_empty(h.shape[0], h.shape[2] if initial is not None else 0)
    return torch.empty_like(a), torch.empty_like(h), rest


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, reset, initial = inputs
    ctx.save_for_backward(a, output, reset, initial)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, h, reset, initial = ctx.saved_tensors
    da, db, dinitial = torch.ops.mm.complex_scan_backward(a, h, reset, initial, grad)
    return da, db, None, dinitial if initial is not None else None


_forward_op.register_autograd(_grads, setup_context=_setup)
