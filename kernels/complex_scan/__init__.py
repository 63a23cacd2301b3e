"""First-order recurrence in complex numbers, as real pairs.

B rows, T tokens, W complex channels, D = 2W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.linear_scan import empty_states, with_last_state
from mm.kernels.op import Op


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Complex product of `(..., 2W)` tensors: W real parts, then W imaginary ones."""
    (ar, ai), (br, bi) = a.chunk(2, -1), b.chunk(2, -1)
    return torch.cat((ar * br - ai * bi, ar * bi + ai * br), -1)


@Op
def complex_scan(
    a: Tensor,
    b_BTD: Tensor,
    reset_BT: Tensor | None = None,
    initial_BD: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a_t * h_{t-1} + b_t`` over each row and complex channel.

    The last dimension of every tensor holds W real parts, then W imaginary ones.

    Args:
        a: `(B, T, 2W)` decays, or `(2W,)` for one decay at all tokens; accumulated in float32 or
            wider.
        b_BTD: `(B, T, 2W)` inputs.
        reset_BT: `(B, T)` bool: here ``h_t = b_t``, whatever was read before; None = nowhere.
        initial_BD: `(B, 2W)` state before the first token that is read; None = zeros.
        reverse: read from the last token to the first, ``h_t = a_t * h_{t+1} + b_t``.
    Returns:
        all states `(B, T, 2W)` and the one of the token read last `(B, 2W)`, both in float32 or
        wider.
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
    steps = list(zip(decays, b_BTD.to(wide).unbind(1), resets, strict=True))
    states = []
    for decay, b, reset in reversed(steps) if reverse else steps:
        before = h if reset is None else h.masked_fill(reset[:, None], 0)
        h = multiply(decay, before) + b
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, 1), h


register_kernel(
    complex_scan,
    "h",
    empty_states,
    saved="a h reset initial reverse",
    gradients="a b:h initial",
    like="b",
    own="a b",
    wide="initial",
    result=with_last_state,
    trivial=lambda a, b, *_: b.shape[1] == 0,
    cpp="scan",
    arguments=lambda a, x, *rest: (a, x, *rest, a.dim() == 1, *x.shape),
    triton="scan_triton",
)
