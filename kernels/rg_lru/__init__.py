"""Gates of the real-gated linear recurrent unit. R tokens, H gate heads, K width of one, W = H *
K.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mm.kernels import compiler
from mm.kernels.fused import fused
from mm.kernels.op import Op

_SOURCE = Path(__file__).with_name("gates.cpp")


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


def _refused(gates_HRG: Tensor, bias_HG: Tensor, rate_W: Tensor, u_RW: Tensor) -> str | None:
    if gates_HRG.dtype != u_RW.dtype:
        return f"gates are {gates_HRG.dtype}, the input {u_RW.dtype}"
    return None


def _outputs(gates: Tensor, bias: Tensor, rate: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return rate.new_empty(u.shape), rate.new_empty(u.shape)


def _gradients(
    gates: Tensor, bias: Tensor, rate: Tensor, u: Tensor, da: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates_, bias_, rate_, u_ = (torch.empty_like(x) for x in (gates, bias, rate, u))
    return gates_, bias_, rate_, u_


def _call(way: str, gates: Tensor, *tensors: Tensor) -> None:
    H, R, G = gates.shape
    name = f"gates_{compiler.SUFFIX[gates.dtype]}_{way}"
    compiler.call(_SOURCE, name, gates, *tensors, R, H, G // 2)


_OPS = fused(
    "rg_lru_gates",
    _outputs,
    _gradients,
    saved=lambda *tensors: tensors[:4],
    wrt=("gates", "bias", "rate", "u"),
    cpp=(partial(_call, "forward"), partial(_call, "backward")),
    triton=f"{__name__}.gates_triton",
)


def _run(
    way: str, gates_HRG: Tensor, bias_HG: Tensor, rate_W: Tensor, u_RW: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gates_HRG.dtype, torch.float32)
    bias, rate = bias_HG.to(wide).contiguous(), rate_W.to(wide).contiguous()
    return _OPS[way](gates_HRG.contiguous(), bias, rate, u_RW.contiguous())


compiler.register(rg_lru_gates, _SOURCE, _run, _refused)
