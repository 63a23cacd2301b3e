"""What the chunk kernels share: tiles of row-major matrices and the decays within a chunk.

Tiles are zero outside their matrix, so a last chunk that is not full, and widths that are no power
of two, need no case of their own: a missing token has key, value and log decay 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # tokens; also the rows of a tile that Hopper's warp-group matrix instructions start at
# Kinds of decay.
NONE, CONSTANT, SCALAR, CHANNEL = (tl.constexpr(i) for i in range(4))


@triton.jit
def load_tile(x, row, col, rows, cols, stride):
    """``x[row, col]``, zero where ``row >= rows`` or ``col >= cols``."""
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    return tl.load(x + row.to(tl.int64)[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(x, value, row, col, rows, cols, stride):
    """Inverse of `load_tile`, in the dtype of ``x``."""
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    at = x + row.to(tl.int64)[:, None] * stride + col[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_log_decay(g, t, T, H, DECAY: tl.constexpr):
    """Log decays `(C,)` of tokens ``t`` of one head, 0 after the row's end."""
    if DECAY == CONSTANT:
        return tl.where(t < T, tl.load(g).to(tl.float32), 0.0)
    else:
        return tl.load(g + t.to(tl.int64) * H, mask=t < T, other=0.0).to(tl.float32)


@triton.jit
def log_into(g, t, T, H, DECAY: tl.constexpr):
    """Log decay `(C,)` from before the chunk to each of its tokens ``t``."""
    return tl.cumsum(load_log_decay(g, t, T, H, DECAY), 0)


@triton.jit
def log_out(g, t, T, H, DECAY: tl.constexpr, C: tl.constexpr):
    """Log decay `(C,)` from each token to the chunk's end: summed, for a difference of long sums
    would lose the short one that it stands for.
    """
    later = load_log_decay(g, t + 1, T, H, DECAY)
    return tl.cumsum(tl.where(tl.arange(0, C) < C - 1, later, 0.0), 0, reverse=True)


@triton.jit
def decay_between(g, t, T, H, DECAY: tl.constexpr, C: tl.constexpr):
    """`(C, C)` decay from token j to token i of a chunk, 0 for i < j.

    The sums are float64, kept as float32 pairs: where two of them are close, the difference of
    their leading parts is exact.
    """
    place = tl.arange(0, C)
    past = place[:, None] >= place[None, :]
    if DECAY == NONE:
        return past.to(tl.float32)
    else:
        total = tl.cumsum(load_log_decay(g, t, T, H, DECAY).to(tl.float64), 0)
        lead = total.to(tl.float32)
        rest = (total - lead.to(tl.float64)).to(tl.float32)
        apart = (lead[:, None] - lead[None, :]) + (rest[:, None] - rest[None, :])
        return tl.exp(tl.where(past, apart, -float("inf")))


@triton.jit
def sum_before(x, C: tl.constexpr):
    """`(C,)`: what stands before each place, without the place itself."""
    place = tl.arange(0, C)
    return tl.sum(tl.where(place[:, None] < place[None, :], x[:, None], 0.0), 0)


def block(width: int, most: int) -> int:
    """Width of a tile over ``width`` columns: a power of two that `tl.dot` takes."""
    return max(16, min(most, triton.next_power_of_2(width)))


def narrow(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors of one dtype that the matrix instructions multiply."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype).contiguous() for x in tensors]
