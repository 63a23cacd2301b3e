"""Mamba's selective scan in Triton.

A program owns one row, one segment of time and a block of channels. It walks over stretches of
time; in each, the N states of its channels are scanned one after another in a tile of time by
channels, so that states `(T, D, N)` are in no memory: only the state before each stretch is
(``kept``), from which the backward makes a stretch again. A token of ``dt = u = b = 0`` leaves the
state as it is up to the rounding of a scan that associates otherwise.

Where those are too few programs, time is cut into segments (`segments_triton`).
"""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.linear_scan.scan_triton import compose
from mm.kernels.parts_triton import sum_parts
from mm.kernels.selective_scan.segments_triton import REGISTERS, find_ends, place, plan, through

CHANNELS = 32  # of a tile; those of a block share partial gradients of b and c
FORWARD_CHANNELS = 16  # 32 bytes of bf16: twice the programs
# Programs that segments are made for: those that an H100's 132 multiprocessors hold at once, by
# registers: 4 of 4 warps forward, 1 of 8 backward.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4 * 132, 132


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
    ends_ptr,
    totals_ptr,
    y_ptr,
    last_ptr,
    kept_ptr,
    T,
    D,
    N,
    segments,
    length,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    _, _, row, segment, d = place(D, segments, BD)
    in_d = d < D
    stretches = tl.cdiv(T, BT)
    begin = segment * length
    end = tl.minimum(begin + length, stretches)
    skip = tl.load(skip_ptr + d, mask=in_d, other=0.0)
    index, states = tl.arange(0, BT), tl.arange(0, BN)
    places = states[:, None] * D + d[None, :]
    every = (states < N)[:, None] & in_d[None, :]
    first = tl.zeros((BN, BD), tl.float32)
    if initial_ptr is not None:
        first += tl.load(initial_ptr + row * N * D + places, mask=every, other=0.0)
    if ends_ptr is not None:
        border = row * (segments - 1)
        first = through(first, a_ptr, ends_ptr, totals_ptr, border, 1, segment, states, d, D, N)
    tl.store(kept_ptr + (row * stretches + begin) * N * D + places, first, mask=every)
    tl.debug_barrier()  # the carry goes through memory, from thread to thread
    for s in range(begin, end):
        t = s * BT + index
        token = row * T + s * BT
        at = token * D + (index[:, None] * D + d[None, :])
        mask = (t < T)[:, None] & in_d[None, :]
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = skip[None, :] * u
        du = dt * u
        for n in range(0, N):
            a = tl.load(a_ptr + n * D + d, mask=in_d, other=0.0)
            of_n = token * N + (index * N + n)
            b = tl.load(b_ptr + of_n, mask=t < T, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + of_n, mask=t < T, other=0.0).to(tl.float32)
            decay = tl.exp(dt * a[None, :])
            if reset_ptr is not None:
                reset = tl.load(reset_ptr + token + index, mask=t < T, other=0) != 0
                decay = tl.where(reset[:, None], 0.0, decay)
            before = ((row * stretches + s) * N + n) * D + d
            carry = tl.load(kept_ptr + before, mask=in_d, other=0.0)
            decay, h = tl.associative_scan((decay, du * b[:, None]), 0, compose)
            h = tl.where(decay == 0, h, decay * carry[None, :] + h)
            y += c[:, None] * h
            carry = tl.sum(tl.where((index == BT - 1)[:, None], h, 0.0), 0)
            if s + 1 < end:
                tl.store(kept_ptr + before + N * D, carry, mask=in_d)
            elif s + 1 == stretches:
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
    ends_ptr,
    totals_ptr,
    gy_ptr,
    glast_ptr,
    du_ptr,
    ddt_ptr,
    own_ptr,
    shared_ptr,
    dh_ptr,
    dinitial_ptr,
    R,
    T,
    D,
    N,
    segments,
    length,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """Run the scan backward over one row, one segment and a block of channels.

    ``dh`` (R * segments, N, D) holds the gradient of the state between stretches. ``own`` (R *
    segments, N + 1, D) gets parts of the gradients of a and skip, ``shared`` (blocks, 2, R, T, N)
    of b and c.
    """
    block, part, row, segment, d = place(D, segments, BD)
    in_d = d < D
    begin = segment * length
    end = tl.minimum(begin + length, tl.cdiv(T, BT))
    stretches = tl.cdiv(T, BT)
    states = tl.arange(0, BN)
    places = states[:, None] * D + d[None, :]
    every = (states < N)[:, None] & in_d[None, :]
    last = tl.zeros((BN, BD), tl.float32)
    if glast_ptr is not None:
        last += tl.load(glast_ptr + row * N * D + places, mask=every, other=0.0)
    if ends_ptr is not None:
        border, many = (row + 1) * (segments - 1) - 1, segments - 1 - segment
        last = through(last, a_ptr, ends_ptr, totals_ptr, border, -1, many, states, d, D, N)
    tl.store(dh_ptr + part * N * D + places, last, mask=every)
    tl.debug_barrier()  # the carry goes through memory, from thread to thread
    index = tl.arange(0, BT)
    for i in range(0, end - begin):
        s = end - 1 - i
        t = s * BT + index
        token = row * T + s * BT
        at = index[:, None] * D + d[None, :]
        mask = (t < T)[:, None] & in_d[None, :]
        u = tl.load(u_ptr + token * D + at, mask=mask, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + token * D + at, mask=mask, other=0.0).to(tl.float32)
        gy = tl.load(gy_ptr + token * D + at, mask=mask, other=0.0).to(tl.float32)
        x = dt * u
        # dx is the gradient of x, the factor of b.
        dx, ddt = tl.zeros((BT, BD), tl.float32), tl.zeros((BT, BD), tl.float32)
        # Nothing after the last token: the step into the next stretch is in the carry already.
        ahead = (index + 1 < BT) & (t + 1 < T)
        next_dt = tl.load(dt_ptr + token * D + at + D, mask=mask & ahead[:, None], other=0.0).to(
            tl.float32
        )
        if reset_ptr is not None:
            resets = reset_ptr + token + index
            reset = tl.load(resets, mask=t < T, other=0) != 0
            next_reset = tl.load(resets + 1, mask=ahead, other=0) != 0
        for n in range(0, N):
            a = tl.load(a_ptr + n * D + d, mask=in_d, other=0.0)
            of_n = index * N + n
            b = tl.load(b_ptr + token * N + of_n, mask=t < T, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + token * N + of_n, mask=t < T, other=0.0).to(tl.float32)
            decay = tl.exp(dt * a[None, :])
            if reset_ptr is not None:
                decay = tl.where(reset[:, None], 0.0, decay)
            of_state = ((row * stretches + s) * N + n) * D + d
            first = tl.load(kept_ptr + of_state, mask=in_d, other=0.0)
            product, h = tl.associative_scan((decay, x * b[:, None]), 0, compose)
            h = tl.where(product == 0, h, product * first[None, :] + h)
            db = shared_ptr + block.to(tl.int64) * 2 * R * T * N + token * N + of_n
            # exp(dt a) h_{t-1} is what h has besides the input: nothing is divided or shifted.
            held = tl.where(decay == 0, 0.0, h - x * b[:, None])
            after = tl.exp(next_dt * a[None, :])
            if reset_ptr is not None:
                after = tl.where(next_reset[:, None], 0.0, after)
            carry_at = dh_ptr + (part * N + n) * D + d
            carry = tl.load(carry_at, mask=in_d, other=0.0)
            product, dh = tl.associative_scan((after, c[:, None] * gy), 0, compose, reverse=True)
            dh = tl.where(product == 0, dh, product * carry[None, :] + dh)
            tl.store(db, tl.sum(tl.where(mask, dh * x, 0.0), 1), mask=t < T)
            dc = tl.sum(tl.where(mask, gy * h, 0.0), 1)
            tl.store(db + R * T * N, dc, mask=t < T)
            dx += dh * b[:, None]
            ddt += dh * held * a[None, :]
            da_at = own_ptr + (part * (N + 1) + n) * D + d
            old = tl.load(da_at, mask=in_d & (i > 0), other=0.0)
            tl.store(da_at, old + tl.sum(tl.where(mask, dh * held * dt, 0.0), 0), mask=in_d)
            out = tl.sum(tl.where((index == 0)[:, None], decay * dh, 0.0), 0)
            tl.store(carry_at, out, mask=in_d)
            if dinitial_ptr is not None:
                tl.store(dinitial_ptr + (row * N + n) * D + d, out, mask=in_d & (s == 0))
        # Read here and not before: the loop has no registers to spare.
        u = tl.load(u_ptr + token * D + at, mask=mask, other=0.0).to(tl.float32)
        skip = tl.load(skip_ptr + d, mask=in_d, other=0.0)
        dskip_at = own_ptr + (part * (N + 1) + N) * D + d
        old = tl.load(dskip_at, mask=in_d & (i > 0), other=0.0)
        tl.store(dskip_at, old + tl.sum(gy * u, 0), mask=in_d)
        ddt += dx * u
        tl.store(ddt_ptr + token * D + at, ddt.to(ddt_ptr.dtype.element_ty), mask=mask)
        du = dx * dt + skip[None, :] * gy
        tl.store(du_ptr + token * D + at, du.to(du_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()


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
    stretch = _stretch(T, kept)
    programs = R * triton.cdiv(D, FORWARD_CHANNELS)
    segments, length = plan(programs, T, stretch, FORWARD_PROGRAMS)
    ends = find_ends(u, dt, a, b, reset, segments, length, stretch, back=False)
    tensors = (u, dt, a, b, c, skip, reset, initial, *ends, y, last, kept)
    tile = (stretch, FORWARD_CHANNELS, triton.next_power_of_2(N))
    grid = (programs * segments,)
    _forward[grid](*tensors, T, D, N, segments, length, *tile, num_warps=4, maxnreg=REGISTERS)


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
    if T == 0:
        da.zero_()
        dskip.zero_()
        if initial is not None:
            dinitial.zero_() if grad_last is None else dinitial.copy_(grad_last)
        return
    stretch = _stretch(T, kept)
    if grad_y is None:  # asked of the last state alone
        grad_y = torch.zeros_like(u)
    blocks = triton.cdiv(D, CHANNELS)
    segments, length = plan(R * blocks, T, stretch, BACKWARD_PROGRAMS)
    ends = find_ends(grad_y, dt, a, c, reset, segments, length, stretch, back=True)
    own, shared = a.new_empty(R * segments, N + 1, D), a.new_empty(blocks, 2, R, T, N)
    dh = a.new_empty(R * segments, N, D)
    tensors = (u, dt, a, b, c, skip, reset, kept, *ends, grad_y, grad_last)
    outs = (du, ddt, own, shared, dh, dinitial if initial is not None else None)
    tile = (stretch, CHANNELS, triton.next_power_of_2(N))
    grid = (R * segments * blocks,)
    _backward[grid](*tensors, *outs, R, T, D, N, segments, length, *tile, num_warps=8)
    sum_parts(own, da, dskip)
    sum_parts(shared, db, dc)


def _stretch(T: int, kept: Tensor) -> int:
    """Tokens between kept states: a power of two, by how many there are."""
    return max(triton.next_power_of_2(triton.cdiv(T, kept.shape[1])), 16)
