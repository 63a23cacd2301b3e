"""First-order recurrence over time. B rows, T tokens, D channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mm.kernels import compiler, device
from mm.kernels.fused import fused
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


def _states(a: Tensor, b: Tensor, reset: Tensor | None, initial: Tensor | None) -> Tensor:
    return torch.empty_like(b, dtype=torch.promote_types(b.dtype, torch.float32))


def _gradients(
    a: Tensor, h: Tensor, reset: Tensor | None, initial: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    first = h.new_empty(h.shape[0], h.shape[2] if initial is not None else 0)
    return torch.empty_like(a), torch.empty_like(h), first


def _call(way: str, *tensors: Tensor | None) -> None:
    like = tensors[1]
    assert like is not None
    compiler.call(_SOURCE, f"scan_{compiler.SUFFIX[like.dtype]}_{way}", *tensors, *like.shape)


_OPS = fused(
    "linear_scan",
    _states,
    _gradients,
    saved=lambda a, b, reset, initial, h: (a, h, reset, initial),
    wrt=("a", "b", "initial"),
    cpp=(partial(_call, "forward"), partial(_call, "backward")),
    triton=f"{__name__}.scan_triton",
)


def run(
    ops: dict[str, Callable],
    way: str,
    a: Tensor,
    b_BTD: Tensor,
    reset_BT: Tensor | None = None,
    initial_BD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Call a fused scan, real or complex, as its kernels ask: wide, contiguous, T above 0."""
    wide = torch.promote_types(b_BTD.dtype, torch.float32)
    B, T, D = b_BTD.shape
    if T == 0:
        zero = b_BTD.new_zeros(B, D, dtype=wide)
        return b_BTD.to(wide), zero if initial_BD is None else initial_BD.to(wide)
    initial = initial_BD.to(wide).contiguous() if initial_BD is not None else None
    reset = reset_BT.contiguous() if reset_BT is not None else None
    a, b = (x.to(wide) if way == "cpp" else x for x in (a, b_BTD))
    h = ops[way](a.contiguous(), b.contiguous(), reset, initial)
    return h, h[:, -1]


linear_scan.register("cpp", partial(compiler.why_not, _SOURCE))(partial(run, _OPS, "cpp"))
linear_scan.register("triton", device.why_not)(partial(run, _OPS, "triton"))
