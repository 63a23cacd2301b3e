"""Mamba's selective scan. R rows, T tokens, D channels, N states of a channel."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mm.kernels import compiler
from mm.kernels.fused import fused
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


def _outputs(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    R, T, _ = u.shape
    return torch.empty_like(u), a.new_empty(R, *a.shape), a.new_empty(R, -(-T // _EVERY), *a.shape)


def _gradients(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    reset: Tensor | None,
    kept: Tensor,
    with_initial: bool,
    grad_y: Tensor | None,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    u_, dt_, a_, b_, c_, skip_ = (torch.empty_like(x) for x in (u, dt, a, b, c, skip))
    return u_, dt_, a_, b_, c_, skip_, a.new_empty(u.shape[0] if with_initial else 0, *a.shape)


def _cpp_forward(u: Tensor, dt: Tensor, a: Tensor, *tensors: Tensor | None) -> None:
    name = f"selective_{compiler.SUFFIX[u.dtype]}_forward"
    compiler.call(_SOURCE, name, u, dt, a, *tensors, *u.shape, a.shape[0])


def _cpp_backward(u: Tensor, dt: Tensor, a: Tensor, *rest: Tensor | bool | None) -> None:
    name = f"selective_{compiler.SUFFIX[u.dtype]}_backward"
    tensors = (x for x in rest if not isinstance(x, bool))
    compiler.call(_SOURCE, name, u, dt, a, *tensors, *u.shape, a.shape[0])


_OPS = fused(
    "selective_scan",
    _outputs,
    _gradients,
    saved=lambda u, dt, a, b, c, skip, reset, initial, y, last, kept: (
        *(u, dt, a, b, c, skip, reset, kept),
        initial is not None,
    ),
    wrt=("u", "dt", "a", "b", "c", "skip", "initial"),
    cpp=(_cpp_forward, _cpp_backward),
    triton=f"{__name__}.scan_triton",
    dense=False,
)


def _run(
    way: str,
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
    u, dt, b, c = (x.to(wide) if way == "cpp" else x for x in (u_RTD, dt_RTD, b_RTN, c_RTN))
    tensors = (x.contiguous() for x in (u, dt, a_ND.to(wide), b, c, skip_D.to(wide)))
    reset = reset_RT.contiguous() if reset_RT is not None else None
    initial = initial_RND.to(wide).contiguous() if initial_RND is not None else None
    y, last, _ = _OPS[way](*tensors, reset, initial)
    return y.to(u_RTD.dtype), last


compiler.register(selective_scan, _SOURCE, _run)
