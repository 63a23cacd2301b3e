"""Mamba's selective scan. R rows, T tokens, D channels, N states of a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.kernels import compiler
from mm.kernels.op import Op

_SOURCE = Path(__file__).with_name("scan.cpp")
_EVERY = 64  # places between kept states, as in scan.cpp


@Op
def selective_scan(
    u_RTD: Tensor,
    dt_RTD: Tensor,
    a_ND: Tensor,
    b_RTN: Tensor,
    c_RTN: Tensor,
    skip_D: Tensor,
    reset_RT: Tensor | None = None,
    initial_RND: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = exp(dt_t * a) * h_{t-1} + dt_t * u_t * b_t``, ``y_t = c_t . h_t + skip * u_t``.

    Args:
        u_RTD: `(R, T, D)` inputs, any float dtype; accumulated in float32 or wider.
        dt_RTD: `(R, T, D)` step sizes, not negative (after the softplus).
        a_ND: `(N, D)` negative rates, the transpose of the paper's A.
        b_RTN: `(R, T, N)` what the input writes, shared by all channels.
        c_RTN: `(R, T, N)` what the output reads.
        skip_D: `(D,)` weight of the input itself.
        reset_RT: `(R, T)` bool: nothing before this place counts (a document begins); None =
            nowhere.
        initial_RND: `(R, N, D)` state before the first token; None = zeros.
    Returns:
        ``y`` `(R, T, D)` in the dtype of ``u`` and the last state `(R, N, D)` in float32 or wider.
        A place of ``dt = u = b = 0`` leaves the state as it is, bit for bit.
    Source: Gu & Dao 2023 (arXiv:2312.00752), algorithm 2 with the discretisation of its section
    3.6: the zero-order hold for A, Euler for B (as the paper's own code).
    """
    wide = torch.promote_types(u_RTD.dtype, torch.float32)
    R, T, D = u_RTD.shape
    a = a_ND.to(wide)
    h = (
        initial_RND.to(wide)
        if initial_RND is not None
        else u_RTD.new_zeros(R, a.shape[0], D, dtype=wide)
    )
    if T == 0:
        return u_RTD, h
    resets = reset_RT.unbind(1) if reset_RT is not None else [None] * T
    wides = [x.to(wide).unbind(1) for x in (u_RTD, dt_RTD, b_RTN, c_RTN)]
    outs = []
    for u, dt, b, c, reset in zip(*wides, resets, strict=True):
        decay = (dt[:, None] * a).exp()
        if reset is not None:
            h, decay = (x.masked_fill(reset[:, None, None], 0) for x in (h, decay))
        h = decay * h + (dt * u)[:, None] * b[..., None]
        outs.append((c[..., None] * h).sum(1))
    y = torch.stack(outs, 1) + skip_D.to(wide) * u_RTD.to(wide)
    return y.to(u_RTD.dtype), h


def _why_not(
    u_RTD: Tensor,
    dt_RTD: Tensor,
    a_ND: Tensor,
    b_RTN: Tensor,
    c_RTN: Tensor,
    skip_D: Tensor,
    reset_RT: Tensor | None = None,
    initial_RND: Tensor | None = None,
) -> str | None:
    return compiler.why_not(_SOURCE, u_RTD, dt_RTD, a_ND, b_RTN, c_RTN, skip_D, initial_RND)


@selective_scan.register("cpp", _why_not)
def _cpp(
    u_RTD: Tensor,
    dt_RTD: Tensor,
    a_ND: Tensor,
    b_RTN: Tensor,
    c_RTN: Tensor,
    skip_D: Tensor,
    reset_RT: Tensor | None = None,
    initial_RND: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(u_RTD.dtype, torch.float32)
    tensors = (x.to(wide).contiguous() for x in (u_RTD, dt_RTD, a_ND, b_RTN, c_RTN, skip_D))
    reset = reset_RT.contiguous() if reset_RT is not None else None
    initial = initial_RND.to(wide).contiguous() if initial_RND is not None else None
    y, last, _ = torch.ops.mm.selective_scan(*tensors, reset, initial)
    return y.to(u_RTD.dtype), last


def _outputs(u: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    R, T, D = u.shape
    stretches = -(-T // _EVERY)
    shape = (a.shape[0], D)
    return torch.empty_like(u), u.new_empty(R, *shape), u.new_empty(R, stretches, *shape)


def _forward(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    y, last, kept = _outputs(u, a)
    name = f"selective_{compiler.SUFFIX[u.dtype]}_forward"
    tensors = (u, dt, a, b, c, skip, reset, initial, y, last, kept)
    compiler.call(_SOURCE, name, *tensors, *u.shape, a.shape[0])
    return y, last, kept


def _gradients(
    u: Tensor, a: Tensor, b: Tensor, skip: Tensor, with_initial: bool
) -> tuple[Tensor, ...]:
    initial = u.new_empty(u.shape[0] if with_initial else 0, *a.shape)
    like = (u, u, a, b, b, skip)
    return *(torch.empty_like(x) for x in like), initial


def _backward(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    reset: Tensor | None,
    kept: Tensor,
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    with_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _gradients(u, a, b, skip, with_initial)
    gy, glast = (g.contiguous() if g is not None else None for g in (grad_y, grad_last))
    outs = (*grads[:6], grads[6] if with_initial else None)
    name = f"selective_{compiler.SUFFIX[u.dtype]}_backward"
    tensors = (u, dt, a, b, c, skip, reset, kept, gy, glast, *outs)
    compiler.call(_SOURCE, name, *tensors, *u.shape, a.shape[0])
    return grads  # type: ignore[return-value]


_forward_op = torch.library.custom_op(
    "mm::selective_scan",
    _forward,
    mutates_args=(),
    schema="(Tensor u, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor skip, Tensor? reset,"
    " Tensor? initial) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "mm::selective_scan_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor u, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor skip, Tensor? reset,"
    " Tensor kept, Tensor? grad_y, Tensor? grad_last, bool with_initial)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(u, a)


@_backward_op.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    reset: Tensor | None,
    kept: Tensor,
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    with_initial: bool,
) -> tuple[Tensor, ...]:
    return _gradients(u, a, b, skip, with_initial)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, dt, a, b, c, skip, reset, initial = inputs
    ctx.save_for_backward(u, dt, a, b, c, skip, reset, output[2])
    ctx.with_initial = initial is not None
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    out = torch.ops.mm.selective_scan_backward(*ctx.saved_tensors, *grads[:2], ctx.with_initial)
    return *out[:6], None, out[6] if ctx.with_initial else None


_forward_op.register_autograd(_grads, setup_context=_setup)
