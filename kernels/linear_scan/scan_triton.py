"""First-order recurrence in Triton: tiles of time by channels, a scan in each, a carry between."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PLACES, CHANNELS = 64, 32  # of a tile


@triton.jit
def compose(a, b, c, d):
    """First ``h -> a h + b``, then ``h -> c h + d``; c = 0 forgets even an infinite state."""
    return a * c, tl.where(c == 0, d, c * b + d)


@triton.jit
def _forward(a_ptr, b_ptr, reset_ptr, initial_ptr, h_ptr, T, D, BT: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(D, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    carry = tl.zeros((BD,), tl.float32)
    if initial_ptr is not None:
        carry += tl.load(initial_ptr + row * D + d, mask=d < D, other=0.0)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        at = (row * T + t)[:, None] * D + d[None, :]
        mask = (t < T)[:, None] & (d < D)[None, :]
        a = tl.load(a_ptr + at, mask=mask, other=1.0).to(tl.float32)
        b = tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + row * T + t, mask=t < T, other=0) != 0
            a = tl.where(reset[:, None], 0.0, a)
        decay, h = tl.associative_scan((a, b), 0, compose)
        h = tl.where(decay == 0, h, decay * carry[None, :] + h)
        tl.store(h_ptr + at, h, mask=mask)
        carry = tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], h, 0.0), 0)


@triton.jit
def _backward(
    a_ptr,
    h_ptr,
    reset_ptr,
    initial_ptr,
    grad_ptr,
    da_ptr,
    db_ptr,
    dinitial_ptr,
    T,
    D,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    blocks = tl.cdiv(D, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    in_d = (d < D)[None, :]
    carry = tl.zeros((BD,), tl.float32)  # gradient of the first state of the tile to the right
    tiles = tl.cdiv(T, BT)
    for i in range(0, tiles):
        t = (tiles - 1 - i) * BT + tl.arange(0, BT)
        at = (row * T + t)[:, None] * D + d[None, :]
        inside, after = (t < T)[:, None] & in_d, (t + 1 < T)[:, None] & in_d
        decay = tl.load(a_ptr + at + D, mask=after, other=0.0).to(tl.float32)
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + row * T + t + 1, mask=t + 1 < T, other=0) != 0
            decay = tl.where(reset[:, None], 0.0, decay)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        decay, dh = tl.associative_scan((decay, grad), 0, compose, reverse=True)
        dh = tl.where(decay == 0, dh, decay * carry[None, :] + dh)
        tl.store(db_ptr + at, dh, mask=inside)
        before = tl.load(h_ptr + at - D, mask=inside & (t > 0)[:, None], other=0.0)
        if initial_ptr is not None:
            first = tl.load(initial_ptr + row * D + d, mask=d < D, other=0.0)
            before = tl.where((t == 0)[:, None], first[None, :], before)
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + row * T + t, mask=t < T, other=0) != 0
            before = tl.where(reset[:, None], 0.0, before)
        tl.store(da_ptr + at, (dh * before).to(da_ptr.dtype.element_ty), mask=inside)
        carry = tl.sum(tl.where((tl.arange(0, BT) == 0)[:, None], dh, 0.0), 0)
    if initial_ptr is not None:
        a = tl.load(a_ptr + row * T * D + d, mask=d < D, other=0.0).to(tl.float32)
        if reset_ptr is not None:
            a = tl.where(tl.load(reset_ptr + row * T) != 0, 0.0, a)
        tl.store(dinitial_ptr + row * D + d, a * carry, mask=d < D)


def forward(a: Tensor, b: Tensor, reset: Tensor | None, initial: Tensor | None, h: Tensor) -> None:
    """Write all states."""
    B, T, D = h.shape
    grid = (B * triton.cdiv(D, CHANNELS),)
    _forward[grid](a, b, reset, initial, h, T, D, PLACES, CHANNELS, num_warps=4)


def backward(
    a: Tensor,
    h: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    grad: Tensor,
    da: Tensor,
    db: Tensor,
    dinitial: Tensor,
) -> None:
    """Write the gradients; ``dinitial`` where there is an initial state."""
    B, T, D = h.shape
    grid = (B * triton.cdiv(D, CHANNELS),)
    tensors = (a, h, reset, initial, grad, da, db, dinitial)
    _backward[grid](*tensors, T, D, PLACES, CHANNELS, num_warps=8)
