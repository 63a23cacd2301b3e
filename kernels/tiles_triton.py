"""What the chunk kernels share: tiles of row-major matrices and the decays within a chunk.

Tiles are zero outside their matrix, so a last chunk that is not full, and widths that are no power
of two, need no case of their own: a missing token has key, value and log decay 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 64  # tokens; also the rows of a tile that Hopper's warp-group matrix instructions start at
C = tl.constexpr(CHUNK)
LEVELS = tl.constexpr(CHUNK.bit_length() - 1)  # of halving a chunk
# Kinds of decay.
NONE, CONSTANT, SCALAR, CHANNEL = (tl.constexpr(i) for i in range(4))


@triton.jit
def place(T, H, AXIS: tl.constexpr):
    """Chunk, row with head, and number of its first token in (B, T, H), of a program.

    Rows with heads are counted on ``AXIS``, chunks on the one before it.
    """
    bh = tl.program_id(AXIS).to(tl.int64)
    return tl.program_id(AXIS - 1).to(tl.int64), bh, bh // H * T * H + bh % H


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
def log_out(g, t, T, H, DECAY: tl.constexpr):
    """Return the log decay `(C,)` from each token to the chunk's end.

    It is summed: a difference of long sums would lose the short one that it stands for.
    """
    later = load_log_decay(g, t + 1, T, H, DECAY)
    return tl.cumsum(tl.where(tl.arange(0, C) < C - 1, later, 0.0), 0, reverse=True)


@triton.jit
def decay_between(g, t, T, H, DECAY: tl.constexpr):
    """`(C, C)` decay from token j to token i of a chunk, 0 for i < j.

    The sums are float64, kept as float32 pairs: where two of them are close, the difference of
    their leading parts is exact.
    """
    index = tl.arange(0, C)
    past = index[:, None] >= index[None, :]
    if DECAY == NONE:
        return past.to(tl.float32)
    else:
        total = tl.cumsum(load_log_decay(g, t, T, H, DECAY).to(tl.float64), 0)
        lead = total.to(tl.float32)
        rest = (total - lead.to(tl.float64)).to(tl.float32)
        apart = (lead[:, None] - lead[None, :]) + (rest[:, None] - rest[None, :])
        return tl.exp(tl.where(past, apart, -float("inf")))


@triton.jit
def sum_before(x):
    """`(C,)`: what stands before each token, without the token itself."""
    index = tl.arange(0, C)
    return tl.sum(tl.where(index[:, None] < index[None, :], x[:, None], 0.0), 0)


@triton.jit
def split(x):
    """float32 as the sum of three bfloat16, which together hold all its bits."""
    a = x.to(tl.bfloat16)
    rest = x - a.to(tl.float32)
    b = rest.to(tl.bfloat16)
    return a, b, (rest - b.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def sum_where(chosen, x):
    """``chosen @ x`` of a bool `(C, C)` with a float32 `(C, N)`, given as its `split`.

    Sums over tokens by matrix instructions: exact products, float32 sums. A scan of so large a tile
    takes most registers of a program.
    """
    ones = chosen.to(tl.bfloat16)
    return tl.dot(ones, x[0], tl.dot(ones, x[1], tl.dot(ones, x[2])))


@triton.jit
def own_decays(g, t, kc, T, K, stride):
    """Log decays `(C, BK)` of the tokens themselves, as their `split`."""
    return split(load_tile(g, t, kc, T, K, stride).to(tl.float32))


@triton.jit
def not_after():
    """`(C, C)`: j <= i. Sums the log decays from before the chunk to each token."""
    return tl.arange(0, C)[None, :] <= tl.arange(0, C)[:, None]


@triton.jit
def after():
    """`(C, C)`: j > i. Sums the log decays from each token to the chunk's end."""
    return tl.arange(0, C)[None, :] > tl.arange(0, C)[:, None]


@triton.jit
def halves(half):
    """Return how blocks of two halves, ``half`` tokens each, divide a chunk.

    That is: which tokens are in a second half `(C, 1)`, which pairs `(C, C)` a block's middle
    divides, and which tokens `(C, C)` stand between each and it.

    Every pair of tokens is divided by exactly one middle, for half = 1, 2, .. C / 2. Its decay is
    the product of a factor from the key to the middle and one from there to the query; neither
    overflows, however strong the decay.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    second = i // half % 2 == 1
    one_block = i // (2 * half) == j // (2 * half)
    divided = one_block & (second != (j // half % 2 == 1))
    middle = i // (2 * half) * (2 * half) + half
    between = tl.where(second, (j >= middle) & (j <= i), (j > i) & (j < middle))
    return second, divided, between


def block(width: int, most: int) -> int:
    """Width of a tile over ``width`` columns: a power of two that `tl.dot` takes."""
    return max(16, min(most, triton.next_power_of_2(width)))
