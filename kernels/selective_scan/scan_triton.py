"""Mamba's selective scan in Triton.

A program owns one row and a block of channels. It walks over stretches of time; in each, the N
states of its channels are scanned one after another in a tile of time by channels, so that states
`(T, D, N)` are in no memory: only the state before each stretch is (``kept``), from which the
backward makes a stretch again. A token of ``dt = u = b = 0`` leaves the state as it is up to the
rounding of a scan that associates otherwise.
"""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.linear_scan.scan_triton import channels, compose

CHANNELS = 32  # of a tile


@triton.jit
def _forward(
    u_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    skip_ptr,
    reset_ptr,
    initial_ptr,
    y_ptr,
    last_ptr,
    kept_ptr,
    T,
    D,
    N,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    row, d = channels(D, BD)
    in_d = d < D
    stretches = tl.cdiv(T, BT)
    skip = tl.load(skip_ptr + d, mask=in_d, other=0.0)
    for n in range(0, N):
        first = tl.zeros((BD,), tl.float32)
        if initial_ptr is not None:
            first += tl.load(initial_ptr + (row * N + n) * D + d, mask=in_d, other=0.0)
        tl.store(kept_ptr + (row * stretches * N + n) * D + d, first, mask=in_d)
    tl.debug_barrier()  # the carry goes through memory, from thread to thread
    for s in range(0, stretches):
        t = s * BT + tl.arange(0, BT)
        at = (row * T + t)[:, None] * D + d[None, :]
        mask = (t < T)[:, None] & in_d[None, :]
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = skip[None, :] * u
        du = dt * u
        for n in range(0, N):
            a = tl.load(a_ptr + n * D + d, mask=in_d, other=0.0)
            of_n = (row * T + t) * N + n
            b = tl.load(b_ptr + of_n, mask=t < T, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + of_n, mask=t < T, other=0.0).to(tl.float32)
            decay = tl.exp(dt * a[None, :])
            if reset_ptr is not None:
                reset = tl.load(reset_ptr + row * T + t, mask=t < T, other=0) != 0
                decay = tl.where(reset[:, None], 0.0, decay)
            before = ((row * stretches + s) * N + n) * D + d
            carry = tl.load(kept_ptr + before, mask=in_d, other=0.0)
            decay, h = tl.associative_scan((decay, du * b[:, None]), 0, compose)
            h = tl.where(decay == 0, h, decay * carry[None, :] + h)
            y += c[:, None] * h
            carry = tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], h, 0.0), 0)
            if s + 1 < stretches:
                tl.store(kept_ptr + before + N * D, carry, mask=in_d)
            else:
                tl.store(last_ptr + (row * N + n) * D + d, carry, mask=in_d)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()


@triton.jit
def _backward(
    u_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    skip_ptr,
    reset_ptr,
    kept_ptr,
    gy_ptr,
    du_ptr,
    ddt_ptr,
    da_ptr,
    db_ptr,
    dc_ptr,
    dskip_ptr,
    dh_ptr,
    T,
    D,
    N,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Run the scan backward over one row and a block of channels.

    ``dh`` (R, N, D) begins as the gradient of the last state and ends as the initial one's; the
    gradients of a and skip are parts of a row, those of b and c of a block of channels.
    """
    blocks = tl.cdiv(D, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    d = block * BD + tl.arange(0, BD)
    in_d = d < D
    stretches = tl.cdiv(T, BT)
    skip = tl.load(skip_ptr + d, mask=in_d, other=0.0)
    dskip = tl.zeros((BD,), tl.float32)
    index = tl.arange(0, BT)
    for i in range(0, stretches):
        s = stretches - 1 - i
        t = s * BT + index
        at = (row * T + t)[:, None] * D + d[None, :]
        mask = (t < T)[:, None] & in_d[None, :]
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gy = tl.zeros((BT, BD), tl.float32)
        if gy_ptr is not None:
            gy += tl.load(gy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dskip += tl.sum(gy * u, 0)
        # dx is the gradient of dt * u, the factor of b.
        dx, ddt = tl.zeros((BT, BD), tl.float32), tl.zeros((BT, BD), tl.float32)
        next_dt = tl.load(
            dt_ptr + at + D, mask=mask & ((index + 1 < BT) & (t + 1 < T))[:, None], other=0.0
        ).to(tl.float32)
        inner = (index + 1 < BT)[:, None]
        for n in range(0, N):
            a = tl.load(a_ptr + n * D + d, mask=in_d, other=0.0)
            of_n = (row * T + t) * N + n
            b = tl.load(b_ptr + of_n, mask=t < T, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + of_n, mask=t < T, other=0.0).to(tl.float32)
            decay, after = tl.exp(dt * a[None, :]), tl.exp(next_dt * a[None, :])
            # The step into the next stretch is in the carry already.
            after = tl.where(inner, after, 1.0)
            if reset_ptr is not None:
                reset = tl.load(reset_ptr + row * T + t, mask=t < T, other=0) != 0
                decay = tl.where(reset[:, None], 0.0, decay)
                ahead = (index + 1 < BT) & (t + 1 < T)
                reset = tl.load(reset_ptr + row * T + t + 1, mask=ahead, other=0) != 0
                after = tl.where(reset[:, None], 0.0, after)
            of_state = ((row * stretches + s) * N + n) * D + d
            first = tl.load(kept_ptr + of_state, mask=in_d, other=0.0)
            product, h = tl.associative_scan((decay, dt * u * b[:, None]), 0, compose)
            h = tl.where(product == 0, h, product * first[None, :] + h)
            carry_at = dh_ptr + (row * N + n) * D + d
            carry = tl.load(carry_at, mask=in_d, other=0.0)
            product, dh = tl.associative_scan((after, c[:, None] * gy), 0, compose, reverse=True)
            dh = tl.where(product == 0, dh, product * carry[None, :] + dh)
            # exp(dt a) h_{t-1} is what h has besides the input: nothing is divided or shifted.
            held = tl.where(decay == 0, 0.0, h - dt * u * b[:, None])
            tl.store(
                dc_ptr + ((block * tl.num_programs(0) // blocks + row) * T + t) * N + n,
                tl.sum(tl.where(mask, gy * h, 0.0), 1),
                mask=t < T,
            )
            tl.store(
                db_ptr + ((block * tl.num_programs(0) // blocks + row) * T + t) * N + n,
                tl.sum(tl.where(mask, dh * dt * u, 0.0), 1),
                mask=t < T,
            )
            dx += dh * b[:, None]
            ddt += dh * held * a[None, :]
            da_at = da_ptr + (row * N + n) * D + d
            old = tl.load(da_at, mask=in_d, other=0.0)
            tl.store(da_at, old + tl.sum(tl.where(mask, dh * held * dt, 0.0), 0), mask=in_d)
            out = tl.sum(tl.where((index == 0)[:, None], decay * dh, 0.0), 0)
            tl.store(carry_at, out, mask=in_d)
        ddt += dx * u
        tl.store(ddt_ptr + at, ddt.to(ddt_ptr.dtype.element_ty), mask=mask)
        du = dx * dt + skip[None, :] * gy
        tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()
    tl.store(dskip_ptr + row * D + d, dskip, mask=in_d)


def forward(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    y: Tensor,
    last: Tensor,
    kept: Tensor,
) -> None:
    """Write outputs, the last state and the state before each stretch."""
    (R, T, D), N = u.shape, a.shape[0]
    if T == 0:
        last.zero_() if initial is None else last.copy_(initial)
        return
    tensors = (u, dt, a, b, c, skip, reset, initial, y, last, kept)
    grid = (R * triton.cdiv(D, CHANNELS),)
    _forward[grid](*tensors, T, D, N, _stretch(T, kept), CHANNELS, num_warps=4)


def backward(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    reset: Tensor | None,
    kept: Tensor,
    initial: Tensor | None,
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    du: Tensor,
    ddt: Tensor,
    da: Tensor,
    db: Tensor,
    dc: Tensor,
    dskip: Tensor,
    dinitial: Tensor,
) -> None:
    """Write the gradients; sums over rows and blocks of channels have a fixed order."""
    (R, T, D), N = u.shape, a.shape[0]
    dh = a.new_zeros(R, N, D) if grad_last is None else grad_last.to(a.dtype).clone()
    rows_a, rows_skip = a.new_zeros(R, N, D), a.new_zeros(R, D)
    blocks = triton.cdiv(D, CHANNELS)
    parts_b, parts_c = (a.new_zeros(blocks, R, T, N) for _ in range(2))
    if T:
        tensors = (u, dt, a, b, c, skip, reset, kept, grad_y)
        outs = (du, ddt, rows_a, parts_b, parts_c, rows_skip, dh)
        stretch = _stretch(T, kept)
        _backward[(R * blocks,)](*tensors, *outs, T, D, N, stretch, CHANNELS, num_warps=8)
    da.copy_(rows_a.sum(0))
    dskip.copy_(rows_skip.sum(0))
    db.copy_(parts_b.sum(0))
    dc.copy_(parts_c.sum(0))
    if initial is not None:
        dinitial.copy_(dh)


def _stretch(T: int, kept: Tensor) -> int:
    """Tokens between kept states: a power of two, by how many there are."""
    return max(triton.next_power_of_2(triton.cdiv(T, kept.shape[1])), 16)
