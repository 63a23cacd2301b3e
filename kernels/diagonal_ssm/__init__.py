"""Diagonal state space over time, fused with its readout.

B rows, T tokens, D channels, N complex states of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.op import Op


@Op
def diagonal_ssm(
    u_BTD: Tensor,
    a_PDN: Tensor,
    c_PDN: Tensor,
    reset_BT: Tensor | None = None,
    initial_BPDN: Tensor | None = None,
    length_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a * h_{t-1} + u_t`` and read ``y_t = sum_n Re(c * h_t)``, without storing states.

    Complex numbers are pairs P = (real, imaginary).

    Args:
        u_BTD: `(B, T, D)` input, any float dtype; accumulated in float32 or wider.
        a_PDN: `(2, D, N)` decays.
        c_PDN: `(2, D, N)` readout.
        reset_BT: `(B, T)` bool: here the state begins at zero; None = nowhere.
        initial_BPDN: `(B, 2, D, N)` state before the first token; None = zeros.
        length_B: `(B,)` int64 tokens of each row; later outputs are 0; None = T.
    Returns:
        outputs `(B, T, D)` and states after each row's last token `(B, 2, D, N)`, both in float32
        or wider.
    Source: Gu et al. 2022, S4D (arXiv:2206.11893), eq. 2 (discretised, B folded into C).
    """
    wide = torch.promote_types(u_BTD.dtype, torch.float32)
    B, T, D = u_BTD.shape
    (ar, ai), (cr, ci) = a_PDN.to(wide), c_PDN.to(wide)
    if initial_BPDN is None:
        hr = hi = u_BTD.new_zeros(B, D, a_PDN.shape[2], dtype=wide)
    else:
        hr, hi = initial_BPDN.to(wide).unbind(1)
    ys = []
    # unbind, not [:, t]: the backward of an index writes a whole zero tensor a step.
    for t, u in enumerate(u_BTD.to(wide).unbind(1)):
        old = hr, hi
        if reset_BT is not None:
            cut = reset_BT[:, t, None, None]
            hr, hi = hr.masked_fill(cut, 0), hi.masked_fill(cut, 0)
        hr, hi = ar * hr - ai * hi + u[..., None], ar * hi + ai * hr
        y = (cr * hr - ci * hi).sum(-1)
        if length_B is not None:
            live = t < length_B
            y = torch.where(live[:, None], y, 0)
            hr = torch.where(live[:, None, None], hr, old[0])
            hi = torch.where(live[:, None, None], hi, old[1])
        ys.append(y)
    y = torch.stack(ys, 1) if ys else u_BTD.to(wide)
    return y, torch.stack((hr, hi), 1)


register_kernel(
    diagonal_ssm,
    "y last",
    lambda u, a, *_: (torch.empty_like(u, dtype=a.dtype), a.new_empty(u.shape[0], *a.shape)),
    saved="u a c reset initial length",
    gradients="u a c initial",
    own="u",
    wide="a c initial",
    prepare=lambda *given: (*given[:5], given[5].long() if given[5] is not None else None),
    cpp="ssm",
    arguments=lambda u, a, *rest: (u, a, *rest, *u.shape, a.shape[2]),
    triton="ssm_triton",
)
