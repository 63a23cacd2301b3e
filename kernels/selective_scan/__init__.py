"""Mamba's selective scan.

R rows, T tokens, D channels, N states of a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.op import Op

EVERY = 64  # tokens between kept states, as in scan.cpp


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
        reset_RT: `(R, T)` bool: nothing before this token counts (a document begins); None =
            nowhere.
        initial_RND: `(R, N, D)` state before the first token; None = zeros.
    Returns:
        ``y`` `(R, T, D)` in the dtype of ``u`` and the last state `(R, N, D)` in float32 or wider.
        A token of ``dt = u = b = 0`` leaves the state as it is, bit for bit.
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


def _empties(u: Tensor, dt: Tensor, a: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    R, T, _D = u.shape
    return torch.empty_like(u), a.new_empty(R, *a.shape), a.new_empty(R, -(-T // EVERY), *a.shape)


register_kernel(
    selective_scan,
    "y last",
    _empties,
    kept="kept",
    saved="u dt a b c skip reset kept initial",
    gradients="u dt a b c skip initial",
    dense=False,
    own="u dt b c",
    wide="a skip initial",
    result=lambda u, *rest: (rest[-3].to(u.dtype), rest[-2]),
    cpp="scan",
    arguments=lambda u, dt, a, *rest: (u, dt, a, *rest, *u.shape, a.shape[0]),
    triton="scan_triton",
)
