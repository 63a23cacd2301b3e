"""Dropout from given draws."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mm.kernels import compiler
from mm.kernels.fused import fused
from mm.kernels.op import Op

_SOURCE = Path(__file__).with_name("dropout.cpp")
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


def _like(x: Tensor, draws: Tensor, lost: int) -> Tensor:
    return x.new_empty(x.shape)


def _gradient(draws: Tensor, lost: int, grad: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


def _forward(x: Tensor, draws: Tensor, lost: int, y: Tensor) -> None:
    name = f"dropout_{compiler.SUFFIX[x.dtype]}"
    compiler.call(_SOURCE, name, x.contiguous(), draws.contiguous(), lost, y, x.numel())


def _backward(draws: Tensor, lost: int, grad: Tensor, out: Tensor) -> None:
    _forward(grad, draws, lost, out)  # the map is linear and its own transpose


_OPS = fused(
    "dropout",
    _like,
    _gradient,
    saved=lambda x, draws, lost, y: (draws, lost),
    wrt=("x",),
    cpp=(_forward, _backward),
)


@dropout.register("cpp", lambda x, draws, lost: compiler.why_not(_SOURCE, x, draws))
def _cpp(x: Tensor, draws: Tensor, lost: int) -> Tensor:
    return _OPS["cpp"](x, draws, lost)
