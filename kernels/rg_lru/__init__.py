"""Gates of the real-gated linear recurrent unit.

R tokens, H gate heads, K width of one, W = H * K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.op import Op


@Op
def rg_lru_gates(
    gates_HRG: Tensor, bias_HG: Tensor, rate_W: Tensor, u_RW: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn gate activations into decay and input of the recurrence ``h_t = a_t * h_{t-1} + b_t``.

    Args:
        gates_HRG: `(H, R, 2K)` activations before the sigmoid: K recurrence gates, then K input
            gates; any float dtype.
        bias_HG: `(H, 2K)` added to them.
        rate_W: `(W,)` positive: ``a = exp(-rate * sigmoid(recurrence gate))``.
        u_RW: `(R, W)` input, in the dtype of the gates.
    Returns:
        a and b, `(R, W)` in float32 or wider; ``b = sqrt(1 - a ** 2) * sigmoid(input gate) * u``.
    Source: De et al. 2024, Griffin (arXiv:2402.19427), eq. 1-4.
    """
    H, R, _ = gates_HRG.shape
    wide = torch.promote_types(gates_HRG.dtype, torch.float32)
    gates = (gates_HRG.to(wide) + bias_HG.to(wide)[:, None]).sigmoid()
    r, i = gates.transpose(0, 1).reshape(R, H, 2, gates.shape[2] // 2).unbind(2)
    log_a = -rate_W.to(wide) * r.reshape(R, rate_W.shape[0])
    # -expm1(2 log a), not 1 - a * a: exact where a is close to 1.
    rest = (-torch.expm1(2 * log_a)).clamp_min(1e-12).sqrt()
    return log_a.exp(), rest * i.reshape(R, rate_W.shape[0]) * u_RW.to(wide)


def _why_not(way: str, gates: Tensor, bias: Tensor, rate: Tensor, u: Tensor) -> str | None:
    same = gates.dtype == u.dtype
    return None if same else f"gates are {gates.dtype}, the input {u.dtype}"


register_kernel(
    rg_lru_gates,
    "a b",
    lambda gates, bias, rate, u: (rate.new_empty(u.shape), rate.new_empty(u.shape)),
    saved="gates bias rate u",
    gradients="gates bias rate u",
    wide="bias rate",
    why_not=_why_not,
    cpp="gates",
    arguments=lambda gates, *rest: (gates, *rest, *gates.shape),
    triton="gates_triton",
)
