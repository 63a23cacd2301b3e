"""Complex first-order recurrence in Triton.

Tiles of time by channels, a scan in each, a carry between.
"""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.linear_scan.scan_triton import channels
from mm.kernels.parts_triton import sum_parts

TOKENS, CHANNELS = 64, 16  # of a tile
REGISTERS = 168  # of a thread; without a limit the assembler spills to fit more programs


@triton.jit
def compose(ar, ai, br, bi, cr, ci, dr, di):
    """First ``h -> a h + b``, then ``h -> c h + d``; c = 0 forgets even an infinite state."""
    cut = (cr == 0) & (ci == 0)
    real = tl.where(cut, dr, cr * br - ci * bi + dr)
    imag = tl.where(cut, di, cr * bi + ci * br + di)
    return ar * cr - ai * ci, ar * ci + ai * cr, real, imag


@triton.jit
def pair(ptr, at, W, mask):
    """Real and imaginary parts of a tile in float32."""
    real = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    return real, tl.load(ptr + at + W, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def keep(ptr, at, W, mask, real, imag):
    tl.store(ptr + at, real.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + at + W, imag.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward(
    a_ptr,
    b_ptr,
    reset_ptr,
    initial_ptr,
    h_ptr,
    T,
    W,
    REVERSE: tl.constexpr,
    CONSTANT: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    row, d = channels(W, BD)
    hr, hi = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if initial_ptr is not None:
        hr, hi = pair(initial_ptr, row * 2 * W + d, W, d < W)
    for start in range(0, T, BT):
        s = start + tl.arange(0, BT)  # as it is read
        t = T - 1 - s if REVERSE else s
        at = (row * T + t)[:, None] * (2 * W) + d[None, :]
        mask = (s < T)[:, None] & (d < W)[None, :]
        of_a = tl.zeros_like(at) + d[None, :] if CONSTANT else at
        ar, ai = pair(a_ptr, of_a, W, mask)
        br, bi = pair(b_ptr, at, W, mask)
        if reset_ptr is not None:
            reset = (tl.load(reset_ptr + row * T + t, mask=s < T, other=0) != 0)[:, None]
            ar, ai = tl.where(reset, 0.0, ar), tl.where(reset, 0.0, ai)
        ar, ai, br, bi = tl.associative_scan((ar, ai, br, bi), 0, compose)
        cut = (ar == 0) & (ai == 0)
        br = tl.where(cut, br, ar * hr[None, :] - ai * hi[None, :] + br)
        bi = tl.where(cut, bi, ar * hi[None, :] + ai * hr[None, :] + bi)
        keep(h_ptr, at, W, mask, br, bi)
        last = (tl.arange(0, BT) == BT - 1)[:, None]
        hr, hi = tl.sum(tl.where(last, br, 0.0), 0), tl.sum(tl.where(last, bi, 0.0), 0)


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
    W,
    REVERSE: tl.constexpr,
    CONSTANT: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    row, d = channels(W, BD)
    in_d = (d < W)[None, :]
    step = -2 * W if REVERSE else 2 * W  # to the token that is read next
    # Gradient of the first state of the tile to the right, and the sums for a constant decay.
    nr, ni = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    sum_r, sum_i = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    tiles = tl.cdiv(T, BT)
    for i in range(0, tiles):
        s = (tiles - 1 - i) * BT + tl.arange(0, BT)
        t = T - 1 - s if REVERSE else s
        at = (row * T + t)[:, None] * (2 * W) + d[None, :]
        inside, after = (s < T)[:, None] & in_d, (s + 1 < T)[:, None] & in_d
        of_a = tl.zeros_like(at) + d[None, :] if CONSTANT else at + step
        cr, ci = pair(a_ptr, of_a, W, after)
        if reset_ptr is not None:
            ahead = reset_ptr + row * T + (t - 1 if REVERSE else t + 1)
            reset = (tl.load(ahead, mask=s + 1 < T, other=0) != 0)[:, None]
            cr, ci = tl.where(reset, 0.0, cr), tl.where(reset, 0.0, ci)
        gr, gi = pair(grad_ptr, at, W, inside)
        cr, ci, gr, gi = tl.associative_scan((cr, -ci, gr, gi), 0, compose, reverse=True)
        cut = (cr == 0) & (ci == 0)
        gr = tl.where(cut, gr, cr * nr[None, :] - ci * ni[None, :] + gr)
        gi = tl.where(cut, gi, cr * ni[None, :] + ci * nr[None, :] + gi)
        keep(db_ptr, at, W, inside, gr, gi)
        pr, pi = pair(h_ptr, at - step, W, inside & (s > 0)[:, None])
        if initial_ptr is not None:
            fr, fi = pair(initial_ptr, row * 2 * W + d, W, d < W)
            pr = tl.where((s == 0)[:, None], fr[None, :], pr)
            pi = tl.where((s == 0)[:, None], fi[None, :], pi)
        if reset_ptr is not None:
            reset = (tl.load(reset_ptr + row * T + t, mask=s < T, other=0) != 0)[:, None]
            pr, pi = tl.where(reset, 0.0, pr), tl.where(reset, 0.0, pi)
        if CONSTANT:
            sum_r += tl.sum(gr * pr + gi * pi, 0)
            sum_i += tl.sum(gi * pr - gr * pi, 0)
        else:
            keep(da_ptr, at, W, inside, gr * pr + gi * pi, gi * pr - gr * pi)
        edge = (tl.arange(0, BT) == 0)[:, None]
        nr, ni = tl.sum(tl.where(edge, gr, 0.0), 0), tl.sum(tl.where(edge, gi, 0.0), 0)
    if CONSTANT:
        keep(da_ptr, row * 2 * W + d, W, d < W, sum_r, sum_i)
    if initial_ptr is not None:
        first = row * T + (T - 1 if REVERSE else 0)
        ar, ai = pair(a_ptr, d if CONSTANT else first * 2 * W + d, W, d < W)
        if reset_ptr is not None:
            cut = tl.load(reset_ptr + first) != 0
            ar, ai = tl.where(cut, 0.0, ar), tl.where(cut, 0.0, ai)
        keep(dinitial_ptr, row * 2 * W + d, W, d < W, ar * nr + ai * ni, ar * ni - ai * nr)


def forward(
    a: Tensor,
    b: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    reverse: bool,
    h: Tensor,
) -> None:
    """Write all states."""
    B, T, D = h.shape
    grid = (B * triton.cdiv(D // 2, CHANNELS),)
    tile = (reverse, a.dim() == 1, TOKENS, CHANNELS)
    _forward[grid](a, b, reset, initial, h, T, D // 2, *tile, num_warps=4)


def backward(
    a: Tensor,
    h: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    reverse: bool,
    grad: Tensor,
    da: Tensor,
    db: Tensor,
    dinitial: Tensor,
) -> None:
    """Write the gradients; a constant decay's is summed over rows in a fixed order."""
    B, T, D = h.shape
    grid = (B * triton.cdiv(D // 2, CHANNELS),)
    constant = a.dim() == 1
    part = h.new_empty(B, D) if constant else da
    tensors = (a, h, reset, initial, grad, part, db, dinitial)
    options = {"num_warps": 8, "maxnreg": REGISTERS}
    _backward[grid](*tensors, T, D // 2, reverse, constant, TOKENS, CHANNELS, **options)
    if constant:
        sum_parts(part, da)
