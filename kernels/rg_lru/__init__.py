"""Gates of the real-gated linear recurrent unit. R tokens, H gate heads, K width of one, W = H *
K.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.kernels import compiler
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


def _why_not(gates_HRG: Tensor, bias_HG: Tensor, rate_W: Tensor, u_RW: Tensor) -> str | None:
    if gates_HRG.dtype != u_RW.dtype:
        return f"gates are {gates_HRG.dtype}, the input {u_RW.dtype}"
    return compiler.why_not(_SOURCE, gates_HRG, bias_HG, rate_W, u_RW)


@rg_lru_gates.register("cpp", _why_not)
def _cpp(gates_HRG: Tensor, bias_HG: Tensor, rate_W: Tensor, u_RW: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gates_HRG.dtype, torch.float32)
    bias, rate = bias_HG.to(wide).contiguous(), rate_W.to(wide).contiguous()
    return torch.ops.mm.rg_lru_gates(gates_HRG.contiguous(), bias, rate, u_RW.contiguous())


def _call(gates: Tensor, way: str, *arguments: Tensor) -> None:
    H, R, G = gates.shape
    compiler.call(_SOURCE, f"gates_{compiler.SUFFIX[gates.dtype]}_{way}", *arguments, R, H, G // 2)


def _forward(gates: Tensor, bias: Tensor, rate: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    a, b = rate.new_empty(u.shape), rate.new_empty(u.shape)
    _call(gates, "forward", gates, bias, rate, u, a, b)
    return a, b


def _backward(
    gates: Tensor, bias: Tensor, rate: Tensor, u: Tensor, da: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = (
        torch.empty_like(gates),
        torch.empty_like(bias),
        torch.empty_like(rate),
        torch.empty_like(u),
    )
    _call(gates, "backward", gates, bias, rate, u, da.contiguous(), db.contiguous(), *out)
    return out


_forward_op = torch.library.custom_op(
    "mm::rg_lru_gates",
    _forward,
    mutates_args=(),
    schema="(Tensor gates, Tensor bias, Tensor rate, Tensor u) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "mm::rg_lru_gates_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor gates, Tensor bias, Tensor rate, Tensor u, Tensor da, Tensor db)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(gates: Tensor, bias: Tensor, rate: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return rate.new_empty(u.shape), rate.new_empty(u.shape)


@_backward_op.register_fake
def _(
    gates: Tensor, bias: Tensor, rate: Tensor, u: Tensor, da: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(gates),
        torch.empty_like(bias),
        torch.empty_like(rate),
        torch.empty_like(u),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _grads(ctx: Any, da: Tensor, db: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.mm.rg_lru_gates_backward(*ctx.saved_tensors, da, db)


_forward_op.register_autograd(_grads, setup_context=_setup)
