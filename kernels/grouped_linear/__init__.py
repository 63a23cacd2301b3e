"""Rows times the matrix of the expert that each belongs to.

R rows, D width, E experts, F width of the result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.op import Op

# Rows of an expert are a multiple of this. A library's product of fewer rows sums in another order,
# so that a token's bits would depend on how many others chose its expert.
BLOCK = 16


@Op
def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Return ``x @ weight[e].T`` of each row, e the expert whose rows it lies among.

    Args:
        x_RD: `(R, D)` any float dtype, expert by expert.
        weight_EFD: `(E, F, D)` in the dtype of ``x``.
        ends_E: `(E,)` int32 first row behind those of each expert, a multiple of `BLOCK`; an
            expert may have none. Rows behind the last end belong to nobody.
    Returns:
        `(R, F)` in the dtype of ``x``; rows of nobody are zeros, and so are their gradients.
    Source: Gale et al. 2022, MegaBlocks (arXiv:2211.15841), section 4: no capacity, no padding to
    the largest expert.
    """
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    rows = torch.arange(x_RD.shape[0], device=x_RD.device, dtype=ends_E.dtype)
    expert = torch.searchsorted(ends_E, rows, right=True)
    y = x_RD.new_zeros(x_RD.shape[0], weight_EFD.shape[1], dtype=wide)
    for e, weight in enumerate(weight_EFD):
        y = torch.where((expert == e)[:, None], x_RD.to(wide) @ weight.to(wide).T, y)
    return y.to(x_RD.dtype)


def _ranges(ends: Tensor, rows: int) -> list[tuple[int, int, int]]:
    """Expert, first row and end of those experts that have rows."""
    stops = [min(end, rows) for end in ends.tolist()]
    starts = [0, *stops[:-1]]
    return [(e, a, b) for e, (a, b) in enumerate(zip(starts, stops, strict=True)) if b > a]


@torch.library.custom_op("mm::grouped_linear_segments", mutates_args=())
def _segments(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y, end = x.new_empty(x.shape[0], weight.shape[1]), 0
    for e, a, b in _ranges(ends, x.shape[0]):
        torch.mm(x[a:b], weight[e].T, out=y[a:b])
        end = b
    y[end:] = 0
    return y


@_segments.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("mm::grouped_linear_segments_backward", mutates_args=())
def _segments_backward(
    x: Tensor, weight: Tensor, ends: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dweight, end = x.new_empty(x.shape), weight.new_zeros(weight.shape), 0
    for e, a, b in _ranges(ends, x.shape[0]):
        torch.mm(dy[a:b], weight[e], out=dx[a:b])
        torch.mm(dy[a:b].T, x[a:b], out=dweight[e])
        end = b
    dx[end:] = 0
    return dx, dweight


@_segments_backward.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_segments_backward(*ctx.saved_tensors, dy.contiguous()), None)


_segments.register_autograd(_gradients, setup_context=_keep)


def _not_on_the_host(x: Tensor, weight: Tensor, ends: Tensor) -> str | None:
    return None if x.device.type == "cpu" else "it reads the ends on the host"


@grouped_linear.register("segments", _not_on_the_host)
def _on_the_host(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _segments(x.contiguous(), weight, ends)


def _not_on_the_device(x: Tensor, weight: Tensor, ends: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device.type}"
    if x.dtype != torch.bfloat16 or weight.dtype != x.dtype:
        return f"x is {x.dtype}, the weights {weight.dtype}: bfloat16 only"
    if weight.shape[1] % 8 or weight.shape[2] % 8:
        return "widths are no multiples of 8"
    return None


@grouped_linear.register("grouped_mm", _not_on_the_device)
def _on_the_device(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    # It leaves rows behind the last end unwritten, in the gradient of x, too.
    nobody = (torch.arange(x.shape[0], device=x.device) >= ends[-1])[:, None]
    # The self-check of kernels cuts rows, not ends.
    offs = ends.clamp_max(x.shape[0])
    y = F.grouped_mm(x.masked_fill(nobody, 0), weight.transpose(1, 2), offs=offs)
    return y.masked_fill(nobody, 0)
