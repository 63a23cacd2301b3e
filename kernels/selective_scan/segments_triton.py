"""Segments of time for the selective scan in Triton: what enters each of them.

Where rows and channels make too few programs, time is cut into segments of whole stretches. A
segment does to a state that enters it, and to a gradient that enters from its end, with
``S(i, j) = dt_i + .. + dt_j`` over its tokens 0 to L::

    h' = exp(a S(0, L)) h + sum_t exp(a S(t + 1, L)) dt_t u_t b_t
    g' = exp(a S(0, L)) g + sum_t exp(a S(0, t)) c_t dy_t

`_ends` finds the sums and ``S(0, L)``, infinite where a document begins: such a step, or one whose
decay is 0, forgets even an infinite state. Every program goes through the segments before its own.
"""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 16  # of a tile: 32 bytes of bf16
REGISTERS = 128  # of a thread; without a limit the assembler spills to fit more programs
SHORTEST = 4  # stretches of a segment


@triton.jit
def place(D, segments, BD: tl.constexpr):
    """Block of channels, row and segment of a program, and its channels."""
    blocks = tl.cdiv(D, BD)
    block = tl.program_id(0) % blocks
    part = (tl.program_id(0) // blocks).to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    return block, part, part // segments, (part % segments).to(tl.int32), d


@triton.jit
def _ends(
    x_ptr,
    dt_ptr,
    a_ptr,
    w_ptr,
    reset_ptr,
    ends_ptr,
    totals_ptr,
    T,
    D,
    N,
    borders,
    length,
    BACK: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Find what leaves a segment at the border to the next one, and the sum of its steps.

    Forward ``x`` is u and ``w`` is b, of all segments but the last; backward the gradient of y and
    c, of all but the first.
    """
    _, part, row, border, d = place(D, borders, BD)
    in_d = d < D
    begin = (border + BACK) * length
    many = tl.minimum(length, tl.cdiv(T, BT) - begin)
    end = tl.minimum((begin + many) * BT, T)
    index = tl.arange(0, BT)
    total = tl.zeros((BD,), tl.float32)
    cuts = 0  # documents that begin between here and the border
    for i in range(0, many):
        s = begin + (i if BACK else many - 1 - i)
        t = s * BT + index
        token = row * T + s * BT
        step = t if BACK else t + 1  # the token whose decay is the first on the way
        live = t < end
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + row * T + step, mask=step < end, other=0) != 0
            reset = reset.to(tl.int32)
            live &= tl.cumsum(reset, 0, reverse=not BACK) + cuts == 0
            cuts += tl.sum(reset, 0)
        # What no longer counts is not read: it may hold inf.
        at = token * D + (index[:, None] * D + d[None, :])
        mask = live[:, None] & in_d[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if BACK:
            dt = tl.load(dt_ptr + at, mask=mask, other=0.0).to(tl.float32)
        else:
            x *= tl.load(dt_ptr + at, mask=mask, other=0.0).to(tl.float32)
            inside = mask & (step < end)[:, None]
            dt = tl.load(dt_ptr + at + D, mask=inside, other=0.0).to(tl.float32)
        way = tl.cumsum(dt, 0, reverse=not BACK) + total[None, :]
        total += tl.sum(dt, 0)
        for n in range(0, N):
            a = tl.load(a_ptr + n * D + d, mask=in_d, other=0.0)
            w = tl.load(w_ptr + token * N + (index * N + n), mask=live, other=0.0).to(tl.float32)
            decay = tl.exp(way * a[None, :])
            sums = tl.sum(tl.where(decay == 0, 0.0, decay * (x * w[:, None])), 0)
            to = ends_ptr + (part * N + n) * D + d
            tl.store(to, sums + tl.load(to, mask=in_d & (i > 0), other=0.0), mask=in_d)
        tl.debug_barrier()
    if not BACK:  # the step into the segment is on no token's way
        first = row * T + begin * BT
        total += tl.load(dt_ptr + first * D + d, mask=in_d, other=0.0).to(tl.float32)
        if reset_ptr is not None:
            cuts += (tl.load(reset_ptr + first) != 0).to(tl.int32)
    tl.store(totals_ptr + part * D + d, tl.where(cuts > 0, float("inf"), total), mask=in_d)


@triton.jit
def through(carry, a_ptr, ends_ptr, totals_ptr, border, step, many, n, d, D, N):
    """Take a carry (N, BD) through ``many`` segments, from one border of `_ends` to the next."""
    mask = (n < N)[:, None] & (d < D)[None, :]
    a = tl.load(a_ptr + n[:, None] * D + d[None, :], mask=mask, other=0.0)
    for i in range(0, many):
        of = border + i * step
        total = tl.load(totals_ptr + of * D + d, mask=d < D, other=0.0)[None, :]
        end = tl.load(ends_ptr + (of * N + n[:, None]) * D + d[None, :], mask=mask, other=0.0)
        decay = tl.where(total == float("inf"), 0.0, tl.exp(total * a))
        carry = tl.where(decay == 0, end, decay * carry + end)
    return carry


def plan(programs: int, T: int, stretch: int, wanted: int) -> tuple[int, int]:
    """Segments of time and stretches of a segment, none shorter than `SHORTEST`.

    As many as make no more than ``wanted`` programs of the ``programs`` that one makes.
    """
    stretches = triton.cdiv(T, stretch)
    segments = max(wanted // max(programs, 1), 1)
    length = min(max(triton.cdiv(stretches, segments), SHORTEST), stretches)
    return triton.cdiv(stretches, length), length


def find_ends(
    x: Tensor, dt: Tensor, a: Tensor, w: Tensor, reset: Tensor | None,
    segments: int, length: int, stretch: int, back: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Sums and steps of the segments that have a next one, as `_ends` says; None of one segment."""
    if segments == 1:
        return None, None
    (R, T, D), N = x.shape, a.shape[0]
    ends, totals = a.new_empty(R, segments - 1, N, D), a.new_empty(R, segments - 1, D)
    tensors = (x, dt, a, w, reset, ends, totals)
    sizes = (T, D, N, segments - 1, length, back, stretch, CHANNELS)
    grid = (R * (segments - 1) * triton.cdiv(D, CHANNELS),)
    _ends[grid](*tensors, *sizes, num_warps=4, maxnreg=REGISTERS)
    return ends, totals
