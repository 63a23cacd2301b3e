"""Diagonal state space with its readout in Triton.

A program owns one row and a block of channels. It walks over stretches of time; in each, the N
complex states of its channels are scanned one after another in a tile of time by channels, so that
no memory holds states `(T, D, N)`. The backward first stores the state before each stretch, then
makes a stretch again from it.
"""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.complex_scan.scan_triton import REGISTERS, compose, keep, pair
from mm.kernels.linear_scan.scan_triton import channels
from mm.kernels.parts_triton import sum_parts

TOKENS, CHANNELS = 64, 16  # of a tile


@triton.jit
def _decays(ar, ai, live, reset_ptr, at):
    """Decays `(BT, BD)` into the tokens ``at``: 0 where a document begins, 1 beyond the row."""
    here = live[:, None]
    real, imag = tl.where(here, ar[None, :], 1.0), tl.where(here, ai[None, :], 0.0)
    if reset_ptr is not None:
        cut = (tl.load(reset_ptr + at, mask=live, other=0) != 0)[:, None]
        real, imag = tl.where(cut, 0.0, real), tl.where(cut, 0.0, imag)
    return real, imag


@triton.jit
def _stepped(ar, ai, hr, hi, br, bi):
    """``a h + b``, where a = 0 forgets even an infinite state."""
    cut = (ar == 0) & (ai == 0)
    real, imag = ar * hr - ai * hi + br, ar * hi + ai * hr + bi
    return tl.where(cut, br, real), tl.where(cut, bi, imag)


@triton.jit
def _forward(
    u_ptr,
    a_ptr,
    c_ptr,
    reset_ptr,
    length_ptr,
    y_ptr,
    state_ptr,
    kept_ptr,
    T,
    D,
    N,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Run the recurrence over one row and a block of channels.

    ``state`` (B, 2, D, N) begins as the initial state and ends as the last; ``kept`` (B,
    stretches, 2, D, N), where given, gets those before each stretch.
    """
    row, d = channels(D, BD)
    in_d = d < D
    end = tl.load(length_ptr + row) if length_ptr is not None else T
    index = tl.arange(0, BT)
    stretches = tl.cdiv(T, BT)
    for s in range(0, stretches):
        t = s * BT + index
        live = t < end
        at = (row * T + t)[:, None] * D + d[None, :]
        mask = live[:, None] & in_d[None, :]
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.zeros((BT, BD), tl.float32)
        for n in range(0, N):
            ar, ai = pair(a_ptr, d * N + n, D * N, in_d)
            ar, ai = _decays(ar, ai, live, reset_ptr, row * T + t)
            before = row * 2 * D * N + d * N + n
            hr, hi = pair(state_ptr, before, D * N, in_d)
            if kept_ptr is not None:
                keep(kept_ptr, (row * stretches + s) * 2 * D * N + d * N + n, D * N, in_d, hr, hi)
            ar, ai, br, bi = tl.associative_scan((ar, ai, u, tl.zeros_like(u)), 0, compose)
            br, bi = _stepped(ar, ai, hr[None, :], hi[None, :], br, bi)
            if y_ptr is not None:
                cr, ci = pair(c_ptr, d * N + n, D * N, in_d)
                y += cr[None, :] * br - ci[None, :] * bi
            last = (index == BT - 1)[:, None]
            hr, hi = tl.sum(tl.where(last, br, 0.0), 0), tl.sum(tl.where(last, bi, 0.0), 0)
            tl.debug_barrier()  # the carry goes through memory, from thread to thread
            keep(state_ptr, before, D * N, in_d, hr, hi)
        if y_ptr is not None:
            inside = (t < T)[:, None] & in_d[None, :]
            tl.store(y_ptr + at, tl.where(live[:, None], y, 0.0), mask=inside)
        tl.debug_barrier()


@triton.jit
def _backward(
    u_ptr,
    a_ptr,
    c_ptr,
    reset_ptr,
    length_ptr,
    kept_ptr,
    dy_ptr,
    du_ptr,
    parts_ptr,
    dh_ptr,
    T,
    D,
    N,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Run the recurrence backward over one row and a block of channels.

    ``dh`` (B, 2, D, N) begins as the gradient of the last state and ends as the initial one's;
    ``parts`` (B, 2, 2, D, N) gets each row's gradients of a and c.
    """
    row, d = channels(D, BD)
    in_d = d < D
    end = tl.load(length_ptr + row) if length_ptr is not None else T
    index = tl.arange(0, BT)
    stretches = tl.cdiv(T, BT)
    for i in range(0, stretches):
        s = stretches - 1 - i
        t = s * BT + index
        live = t < end
        at = (row * T + t)[:, None] * D + d[None, :]
        mask = live[:, None] & in_d[None, :]
        g = tl.load(dy_ptr + at, mask=mask, other=0.0)
        # The input before each token, but for the stretch's first: what stands there is kept.
        inner = (t - 1 < end) & (index > 0)
        old_u = tl.load(u_ptr + at - D, mask=inner[:, None] & in_d[None, :], other=0.0)
        old_u = old_u.to(tl.float32)
        du = tl.zeros((BT, BD), tl.float32)
        for n in range(0, N):
            ar, ai = pair(a_ptr, d * N + n, D * N, in_d)
            cr, ci = pair(c_ptr, d * N + n, D * N, in_d)
            of_n = row * 2 * D * N + d * N + n
            # States before each token, from the one before the stretch.
            fr, fi = pair(kept_ptr, of_n + (row * (stretches - 1) + s) * 2 * D * N, D * N, in_d)
            pr, pi = _decays(ar, ai, inner, reset_ptr, row * T + t - 1)
            pr, pi, br, bi = tl.associative_scan((pr, pi, old_u, tl.zeros_like(old_u)), 0, compose)
            pr, pi = _stepped(pr, pi, fr[None, :], fi[None, :], br, bi)
            # Gradients of the states; the step into the next stretch is in the carry already.
            nr, ni = pair(dh_ptr, of_n, D * N, in_d)
            ahead = (t + 1 < end) & (index + 1 < BT)
            er, ei = _decays(ar, ai, ahead, reset_ptr, row * T + t + 1)
            er, ei, br, bi = tl.associative_scan(
                (er, -ei, g * cr[None, :], -g * ci[None, :]), 0, compose, reverse=True
            )
            er, ei = _stepped(er, ei, nr[None, :], ni[None, :], br, bi)
            du += er
            xr, xi = _decays(ar, ai, live, reset_ptr, row * T + t)
            u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
            hr, hi = _stepped(xr, xi, pr, pi, u, tl.zeros_like(u))
            of_a = parts_ptr + row * 4 * D * N
            of_c, begun = of_a + 2 * D * N, in_d & (i > 0)
            old = pair(of_c, d * N + n, D * N, begun)
            sum_r, sum_i = old[0] + tl.sum(g * hr, 0), old[1] - tl.sum(g * hi, 0)
            keep(of_c, d * N + n, D * N, in_d, sum_r, sum_i)
            through = mask & ((xr != 0) | (xi != 0))
            pr, pi = tl.where(through, pr, 0.0), tl.where(through, pi, 0.0)
            old = pair(of_a, d * N + n, D * N, begun)
            sum_r, sum_i = (
                old[0] + tl.sum(er * pr + ei * pi, 0),
                old[1] + tl.sum(ei * pr - er * pi, 0),
            )
            keep(of_a, d * N + n, D * N, in_d, sum_r, sum_i)
            first = (index == 0)[:, None]
            nr = tl.sum(tl.where(first, xr * er + xi * ei, 0.0), 0)
            ni = tl.sum(tl.where(first, xr * ei - xi * er, 0.0), 0)
            tl.debug_barrier()
            keep(dh_ptr, of_n, D * N, in_d, nr, ni)
        inside = (t < T)[:, None] & in_d[None, :]
        du = tl.where(live[:, None], du, 0.0)
        tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()


def _run(
    u: Tensor,
    a: Tensor,
    c: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    length: Tensor | None,
    y: Tensor | None,
    state: Tensor,
    kept: Tensor | None = None,
) -> None:
    B, T, D = u.shape
    state.zero_() if initial is None else state.copy_(initial)
    tensors = (u, a, c, reset, length, y, state, kept)
    grid = (B * triton.cdiv(D, CHANNELS),)
    options = {"num_warps": 4, "maxnreg": REGISTERS}
    _forward[grid](*tensors, T, D, a.shape[2], TOKENS, CHANNELS, **options)


def forward(*tensors: Tensor) -> None:
    """Write outputs and last states, as the op's rule of shapes gives them."""
    _run(*tensors)


def backward(
    u: Tensor,
    a: Tensor,
    c: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    length: Tensor | None,
    dy: Tensor,
    dlast: Tensor,
    du: Tensor,
    da: Tensor,
    dc: Tensor,
    dinitial: Tensor,
) -> None:
    """Write the gradients; those of a and c are summed over rows in a fixed order."""
    B, T, D = u.shape
    dh = dlast.clone() if initial is None else dinitial.copy_(dlast)
    kept = a.new_empty(B, triton.cdiv(T, TOKENS), *a.shape)
    parts = a.new_empty(B if T else 0, 2, *a.shape)
    _run(u, a, c, reset, initial, length, None, a.new_empty(B, *a.shape), kept)
    tensors = (u, a, c, reset, length, kept, dy, du, parts, dh)
    grid = (B * triton.cdiv(D, CHANNELS),)
    _backward[grid](*tensors, T, D, a.shape[2], TOKENS, CHANNELS, num_warps=8)
    sum_parts(parts, da, dc)
