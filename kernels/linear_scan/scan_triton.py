"""First-order recurrence in Triton: tiles of time by channels, a scan in each, a carry between."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 64, 32  # of a tile


@triton.jit
def channels(D, BD: tl.constexpr):
    """Row and channels of a program that owns a row and a block of channels."""
    blocks = tl.cdiv(D, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, tl.program_id(0) % blocks * BD + tl.arange(0, BD)


@triton.jit
def compose(a, b, c, d):
    """First ``h -> a h + b``, then ``h -> c h + d``; c = 0 forgets even an infinite state."""
    return a * c, tl.where(c == 0, d, c * b + d)


@triton.jit
def log_add(x, y):
    """``log(exp(x) + exp(y))``; of equal numbers, infinite ones too, the difference is 0."""
    apart = tl.where(x == y, 0.0, tl.abs(x - y))
    return tl.maximum(x, y) + tl.log(1.0 + tl.exp(-apart))


@triton.jit
def _compose_logs(a, b, c, d):
    """`compose` of logarithms."""
    none = -float("inf")
    return tl.where((a == none) | (c == none), none, a + c), tl.where(
        c == none, d, log_add(c + b, d)
    )


@triton.jit
def _share(part, whole):
    """``exp(part - whole)``: the share of a sum."""
    return tl.exp(tl.where(part == whole, 0.0, part - whole))


@triton.jit
def _forward(
    a_ptr,
    b_ptr,
    reset_ptr,
    initial_ptr,
    h_ptr,
    T,
    D,
    REVERSE: tl.constexpr,
    LOG: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    row, d = channels(D, BD)
    zero = -float("inf") if LOG else 0.0
    one = 0.0 if LOG else 1.0
    carry = tl.full((BD,), zero, tl.float32)
    if initial_ptr is not None:
        carry = tl.load(initial_ptr + row * D + d, mask=d < D, other=0.0)
    for start in range(0, T, BT):
        s = start + tl.arange(0, BT)  # as it is read
        t = T - 1 - s if REVERSE else s
        at = (row * T + t)[:, None] * D + d[None, :]
        mask = (s < T)[:, None] & (d < D)[None, :]
        a = tl.load(a_ptr + at, mask=mask, other=one).to(tl.float32)
        b = tl.load(b_ptr + at, mask=mask, other=zero).to(tl.float32)
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + row * T + t, mask=s < T, other=0) != 0
            a = tl.where(reset[:, None], zero, a)
        if LOG:
            decay, h = tl.associative_scan((a, b), 0, _compose_logs)
            h = tl.where(decay == zero, h, log_add(decay + carry[None, :], h))
        else:
            decay, h = tl.associative_scan((a, b), 0, compose)
            h = tl.where(decay == 0, h, decay * carry[None, :] + h)
        tl.store(h_ptr + at, h, mask=mask)
        carry = tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], h, 0.0), 0)


@triton.jit
def _backward(
    a_ptr,
    b_ptr,
    h_ptr,
    reset_ptr,
    initial_ptr,
    grad_ptr,
    da_ptr,
    db_ptr,
    dinitial_ptr,
    T,
    D,
    REVERSE: tl.constexpr,
    LOG: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Run the scan of the gradients, in logarithms a linear one too.

    Its decay is then the share of a state in the next one.
    """
    row, d = channels(D, BD)
    in_d = (d < D)[None, :]
    step = -D if REVERSE else D  # to the token that is read next
    carry = tl.zeros((BD,), tl.float32)  # gradient of the first state of the tile to the right
    tiles = tl.cdiv(T, BT)
    for i in range(0, tiles):
        s = (tiles - 1 - i) * BT + tl.arange(0, BT)
        t = T - 1 - s if REVERSE else s
        at = (row * T + t)[:, None] * D + d[None, :]
        inside, after = (s < T)[:, None] & in_d, (s + 1 < T)[:, None] & in_d
        decay = tl.load(a_ptr + at + step, mask=after, other=0.0).to(tl.float32)
        if LOG:
            here = tl.load(h_ptr + at, mask=inside, other=0.0)
            decay = _share(decay + here, tl.load(h_ptr + at + step, mask=after, other=0.0))
            decay = tl.where(after, decay, 0.0)
        if reset_ptr is not None:
            ahead = reset_ptr + row * T + (t - 1 if REVERSE else t + 1)
            decay = tl.where((tl.load(ahead, mask=s + 1 < T, other=0) != 0)[:, None], 0.0, decay)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        decay, dh = tl.associative_scan((decay, grad), 0, compose, reverse=True)
        dh = tl.where(decay == 0, dh, decay * carry[None, :] + dh)
        before = tl.load(h_ptr + at - step, mask=inside & (s > 0)[:, None], other=0.0)
        if LOG:
            before = tl.where((s == 0)[:, None], -float("inf"), before)
        if initial_ptr is not None:
            first = tl.load(initial_ptr + row * D + d, mask=d < D, other=0.0)
            before = tl.where((s == 0)[:, None], first[None, :], before)
        if LOG:
            a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
            here = tl.load(h_ptr + at, mask=inside, other=0.0)
            before, db = _share(a + before, here), dh * _share(b, here)
        else:
            db = dh
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + row * T + t, mask=s < T, other=0) != 0
            before = tl.where(reset[:, None], 0.0, before)
        tl.store(db_ptr + at, db, mask=inside)
        tl.store(da_ptr + at, (dh * before).to(da_ptr.dtype.element_ty), mask=inside)
        carry = tl.sum(tl.where((tl.arange(0, BT) == 0)[:, None], dh, 0.0), 0)
    if initial_ptr is not None:
        first = row * T + (T - 1 if REVERSE else 0)
        a = tl.load(a_ptr + first * D + d, mask=d < D, other=0.0).to(tl.float32)
        if LOG:
            before = tl.load(initial_ptr + row * D + d, mask=d < D, other=0.0)
            a = _share(a + before, tl.load(h_ptr + first * D + d, mask=d < D, other=0.0))
        if reset_ptr is not None:
            a = tl.where(tl.load(reset_ptr + first) != 0, 0.0, a)
        tl.store(dinitial_ptr + row * D + d, a * carry, mask=d < D)


def forward(
    a: Tensor,
    b: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    reverse: bool,
    log: bool,
    h: Tensor,
) -> None:
    """Write all states."""
    B, T, D = h.shape
    grid = (B * triton.cdiv(D, CHANNELS),)
    tile = (reverse, log, TOKENS, CHANNELS)
    warps = 8 if log else 4  # sums of logarithms take the registers of both
    _forward[grid](a, b, reset, initial, h, T, D, *tile, num_warps=warps)


def backward(
    a: Tensor,
    b: Tensor | None,
    h: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    reverse: bool,
    log: bool,
    grad: Tensor,
    da: Tensor,
    db: Tensor,
    dinitial: Tensor,
) -> None:
    """Write the gradients; ``dinitial`` where there is an initial state."""
    B, T, D = h.shape
    grid = (B * triton.cdiv(D, CHANNELS),)
    tensors = (a, b, h, reset, initial, grad, da, db, dinitial)
    # With 8 warps the assembler spills to fit more programs.
    _backward[grid](*tensors, T, D, reverse, log, TOKENS, CHANNELS, num_warps=4)
