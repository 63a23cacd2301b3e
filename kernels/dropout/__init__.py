"""Dropout from given draws."""

from __future__ import annotations

from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.op import Op

LEVELS = 65536  # values of a draw


@Op
def dropout(x: Tensor, draws: Tensor, lost: int) -> Tensor:
    """Zero a share of ``x`` and scale the rest so that the mean stays.

    Args:
        x: `(...)` any float dtype; masked and scaled in it.
        draws: `(n,)` int16, one for each element of ``x`` or more, uniform over all their values.
        lost: elements whose draw is among this many of the 65,536 values are zeroed; below 65,536.
    Returns:
        `(...)` in the dtype of ``x``.
    Source: Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from
    overfitting, sec. 4 (inverted form).
    """
    drawn = draws[: x.numel()].view(x.shape)
    kept = (drawn >= lost - LEVELS // 2).to(x.dtype) * (LEVELS / (LEVELS - lost))
    return x * kept


register_kernel(
    dropout,
    "y",
    lambda x, draws, lost: x.new_empty(x.shape),
    saved="draws lost",
    gradients="x:dy",
    cpp="dropout",
    arguments=lambda *given: (*given, given[-1].numel()),
)
