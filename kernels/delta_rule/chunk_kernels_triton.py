"""Kernels of the chunk form of the (gated) delta rule.

B rows, T tokens, H heads, K key width, V value width; n chunks of C tokens; BK, BV columns of a
tile.

What is written in a chunk, ``written = U - W S``, solves a unitriangular system of its keys; with
``written`` for values the rest is linear attention, whose kernels run here too.

Source: Yang et al. 2024 (arXiv:2406.06484), section 3; with decay: arXiv:2412.06464, section 3.3.
"""

# Triton's types are those of Python, not of its language.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.tiles_triton import (
    CHUNK,
    NONE,
    C,
    after,
    decay_between,
    load_log_decay,
    load_tile,
    log_into,
    log_out,
    place,
    store_tile,
)

LEAF = tl.constexpr(16)  # tokens of a block that substitution inverts
LEAVES = tl.constexpr(CHUNK // 16)
MERGES = tl.constexpr((CHUNK // 16).bit_length() - 1)


@triton.jit
def _merge(T, L, HALF: tl.constexpr):
    """Inverses `(C / 2 HALF, 2 HALF, 2 HALF)` of blocks from those of their halves.

    Products of whole chunks would hold operands in more registers than an sm_80 has.
    """
    PAIRS: tl.constexpr = C // (2 * HALF)
    i, j = tl.arange(0, 2)[None, :, None, None, None], tl.arange(0, 2)[None, None, None, :, None]
    own = tl.arange(0, PAIRS)[:, None, None, None] == tl.arange(0, PAIRS)[None, None, :, None]
    blocks = tl.sum(tl.where(own, tl.reshape(L, (PAIRS, 2 * HALF, PAIRS, 2 * HALF)), 0.0), 2)
    blocks = tl.where(i > j, tl.reshape(blocks, (PAIRS, 2, HALF, 2, HALF)), 0.0)
    L21 = tl.sum(tl.sum(blocks, 3), 1)
    T = tl.reshape(T, (PAIRS, 2, HALF, 1, HALF))
    T11 = tl.sum(tl.sum(tl.where(i == 0, T, 0.0), 3), 1)
    T22 = tl.sum(tl.sum(tl.where(i == 1, T, 0.0), 3), 1)
    T21 = tl.dot(tl.dot(T22, L21, input_precision="tf32x3"), T11, input_precision="tf32x3")
    T = tl.where(i == j, T, tl.where(i > j, -T21[:, None, :, None, :], 0.0))
    return tl.reshape(T, (PAIRS, 2 * HALF, 2 * HALF))


@triton.jit
def _inverse(L):
    """Return ``(I + L)^-1`` of a strictly lower `(C, C)`.

    Blocks of LEAF tokens are solved by substitution, all at once, then merged by ``-T22 L21
    T11``.
    """
    i = tl.arange(0, LEAVES)[:, None, None, None]
    j = tl.arange(0, LEAVES)[None, None, :, None]
    leaves = tl.reshape(L, (LEAVES, LEAF, LEAVES, LEAF))
    leaves = tl.sum(tl.where(i == j, leaves, 0.0), 2)
    index = tl.arange(0, LEAF)[None, :, None]
    T = tl.where(index == tl.arange(0, LEAF)[None, None, :], 1.0, 0.0)
    T = tl.broadcast_to(T, (LEAVES, LEAF, LEAF))
    for row in range(1, LEAF):
        factors = tl.sum(tl.where(index == row, leaves, 0.0), 1)
        above = tl.sum(factors[:, :, None] * T, 1)
        T -= tl.where(index == row, above[:, None, :], 0.0)
    for level in tl.static_range(MERGES):
        T = _merge(T, L, LEAF << level)
    return tl.reshape(T, (C, C))


@triton.jit
def inverses(
    k, beta, g, solved, T, H,
    K: tl.constexpr, DECAY: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inverse `(C, C)` of one chunk's system."""
    c, bh, head = place(T, H, 1)
    index = tl.arange(0, C)
    t = c * C + index
    kk = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
        kt = load_tile(k + head * K, t, first + tl.arange(0, BK), T, K, H * K)
        kk = tl.dot(kt, tl.trans(kt), kk, input_precision=PRECISION)
    strength = tl.load(beta + head + t * H, mask=t < T, other=0.0).to(tl.float32)
    kk *= decay_between(g + head, t, T, H, DECAY) * strength[:, None]
    inverse = _inverse(tl.where(tl.trans(after()), kk, 0.0))
    store_tile(solved + (bh * tl.cdiv(T, C) + c) * C * C, inverse, index, index, C, C, C)


@triton.jit
def solve(
    k, v, beta, g, solved, u, w, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U and W: what one chunk's inverse makes of its values and of its decayed keys."""
    c, bh, head = place(T, H, 1)
    index = tl.arange(0, C)
    t = c * C + index
    inverse = load_tile(solved + (bh * tl.cdiv(T, C) + c) * C * C, index, index, C, C, C)
    strength = tl.load(beta + head + t * H, mask=t < T, other=0.0).to(tl.float32)
    for first in range(0, V, BV):
        vc = first + tl.arange(0, BV)
        vt = load_tile(v + head * V, t, vc, T, V, H * V)
        vt = (vt * strength[:, None]).to(vt.dtype)
        made = tl.dot(inverse, vt, input_precision=PRECISION)
        store_tile(u + head * V, made, t, vc, T, V, H * V)
    if DECAY != NONE:
        strength *= tl.exp(log_into(g + head, t, T, H, DECAY))
    for first in range(0, K, BK):
        kc = first + tl.arange(0, BK)
        kt = load_tile(k + head * K, t, kc, T, K, H * K)
        kt = (kt * strength[:, None]).to(kt.dtype)
        made = tl.dot(inverse, kt, input_precision=PRECISION)
        store_tile(w + head * K, made, t, kc, T, K, H * K)


@triton.jit
def states_forward(
    k, u, w, g, initial, states, written, final, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, BEGUN: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State `(K, BV)` before every chunk and after the last one, and what each chunk writes."""
    kc = tl.arange(0, BK)
    vc = tl.program_id(0) * BV + tl.arange(0, BV)
    _, bh, head = place(T, H, 1)
    n = tl.cdiv(T, C)
    k, w, g = k + head * K, w + head * K, g + head
    u, written = u + head * V, written + head * V
    states += bh * n * K * V
    S = tl.zeros((BK, BV), tl.float32)
    if BEGUN:
        S += load_tile(initial + bh * K * V, kc, vc, K, V, V)
    for c in range(n):
        store_tile(states, S, kc, vc, K, V, V)
        states += K * V
        t = c * C + tl.arange(0, C)
        wt = load_tile(w, t, kc, T, K, H * K)
        x = load_tile(u, t, vc, T, V, H * V).to(tl.float32)
        x -= tl.dot(wt, S.to(wt.dtype), input_precision=PRECISION)
        store_tile(written, x, t, vc, T, V, H * V)
        if DECAY != NONE:
            S *= tl.exp(tl.sum(load_log_decay(g, t, T, H, DECAY), 0))
            x *= tl.exp(log_out(g, t, T, H, DECAY))[:, None]
        kt = load_tile(k, t, kc, T, K, H * K)
        S = tl.dot(tl.trans(kt), x.to(kt.dtype), S, input_precision=PRECISION)
    store_tile(final + bh * K * V, S, kc, vc, K, V, V)


@triton.jit
def states_backward(
    q, k, w, g, do, dfinal, dstates, dwritten, dinitial, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient `(K, BV)` of the state after every chunk and of the initial one.

    Completes ``dwritten``, which comes with what outputs ask.
    """
    kc = tl.arange(0, BK)
    vc = tl.program_id(0) * BV + tl.arange(0, BV)
    _, bh, head = place(T, H, 1)
    n = tl.cdiv(T, C)
    q, k, w, g = q + head * K, k + head * K, w + head * K, g + head
    do, dwritten = do + head * V, dwritten + head * V
    dstates += (bh + 1) * n * K * V
    dS = tl.zeros((BK, BV), tl.float32) + load_tile(dfinal + bh * K * V, kc, vc, K, V, V)
    for c in range(n):
        dstates -= K * V
        store_tile(dstates, dS, kc, vc, K, V, V)
        t = (n - 1 - c) * C + tl.arange(0, C)
        kt = load_tile(k, t, kc, T, K, H * K)
        dy = load_tile(do, t, vc, T, V, H * V).to(tl.float32)
        x = tl.dot(kt, dS.to(kt.dtype), input_precision=PRECISION)
        if DECAY != NONE:
            x *= tl.exp(log_out(g, t, T, H, DECAY))[:, None]
            into = log_into(g, t, T, H, DECAY)
            dS *= tl.exp(tl.min(into, 0))
            dy *= tl.exp(into)[:, None]
        x += load_tile(dwritten, t, vc, T, V, H * V).to(tl.float32)
        store_tile(dwritten, x, t, vc, T, V, H * V)
        qt = load_tile(q, t, kc, T, K, H * K)
        wt = load_tile(w, t, kc, T, K, H * K)
        dS = tl.dot(tl.trans(qt), dy.to(qt.dtype), dS, input_precision=PRECISION)
        dS = tl.dot(tl.trans(wt), (-x).to(wt.dtype), dS, input_precision=PRECISION)
    store_tile(dinitial + bh * K * V, dS, kc, vc, K, V, V)


@triton.jit
def erasers_backward(
    solved, states, dwritten, dbegun, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient `(C, BK)` of one chunk's decayed keys times beta, through W."""
    kc = tl.program_id(0) * BK + tl.arange(0, BK)
    c, bh, head = place(T, H, 2)
    chunk = bh * tl.cdiv(T, C) + c
    index = tl.arange(0, C)
    t = c * C + index
    dw = tl.zeros((C, BK), tl.float32)
    for first in range(0, V, BV):
        vc = first + tl.arange(0, BV)
        x = load_tile(dwritten + head * V, t, vc, T, V, H * V)
        S = load_tile(states + chunk * K * V, kc, vc, K, V, V).to(x.dtype)
        dw = tl.dot(x, tl.trans(S), dw, input_precision=PRECISION)
    inverse = load_tile(solved + chunk * C * C, index, index, C, C, C)
    d = tl.dot(tl.trans(inverse), (-dw).to(inverse.dtype), input_precision=PRECISION)
    store_tile(dbegun + head * K, d, t, kc, T, K, H * K)


@triton.jit
def solve_backward(
    k, v, beta, g, solved, u, w, dwritten, dbegun, dk_read, dk, dv, dbeta, dg, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's values, strengths, keys and log decays.

    Those of keys hold ``dk_read`` of their other uses; those of decays are the ones through the
    system that the chunk solves.
    """
    c, bh, head = place(T, H, 1)
    g += head
    index = tl.arange(0, C)
    t = c * C + index
    strength = tl.load(beta + head + t * H, mask=t < T, other=0.0).to(tl.float32)
    into = tl.zeros((C,), tl.float32)
    if DECAY != NONE:
        into += log_into(g, t, T, H, DECAY)
    into = tl.exp(into)
    inverse = load_tile(solved + (bh * tl.cdiv(T, C) + c) * C * C, index, index, C, C, C)
    dsystem = tl.zeros((C, C), tl.float32)
    ds = tl.zeros((C,), tl.float32)
    for first in range(0, V, BV):
        vc = first + tl.arange(0, BV)
        x = load_tile(dwritten + head * V, t, vc, T, V, H * V)
        d = tl.dot(tl.trans(inverse), x, input_precision=PRECISION)
        ut = load_tile(u + head * V, t, vc, T, V, H * V)
        dsystem = tl.dot(d.to(ut.dtype), tl.trans(ut), dsystem, input_precision=PRECISION)
        ds += tl.sum(d * load_tile(v + head * V, t, vc, T, V, H * V), 1)
        store_tile(dv + head * V, d * strength[:, None], t, vc, T, V, H * V)
    kk = tl.zeros((C, C), tl.float32)
    erased = tl.zeros((C,), tl.float32)
    for first in range(0, K, BK):
        kc = first + tl.arange(0, BK)
        d = load_tile(dbegun + head * K, t, kc, T, K, H * K)
        wt = load_tile(w + head * K, t, kc, T, K, H * K)
        kt = load_tile(k + head * K, t, kc, T, K, H * K)
        dsystem = tl.dot(d, tl.trans(wt), dsystem, input_precision=PRECISION)
        kk = tl.dot(kt, tl.trans(kt), kk, input_precision=PRECISION)
        erased += tl.sum(d.to(tl.float32) * kt.to(tl.float32), 1)
    erased *= into
    between = decay_between(g, t, T, H, DECAY)
    dsystem = tl.where(tl.trans(after()), -dsystem * between, 0.0)
    moved = dsystem * kk
    ds += erased + tl.sum(moved, 1)
    tl.store(dbeta + head + t * H, ds.to(dbeta.dtype.element_ty), mask=t < T)
    if DECAY != NONE:
        moved *= strength[:, None]
        rate = tl.sum(moved, 1) - tl.sum(moved, 0) + erased * strength
        tl.store(dg + head + t * H, tl.cumsum(rate, 0, reverse=True), mask=t < T)
    dsystem *= strength[:, None]
    both_ways = (dsystem + tl.trans(dsystem)).to(k.dtype.element_ty)
    for first in range(0, K, BK):
        kc = first + tl.arange(0, BK)
        kt = load_tile(k + head * K, t, kc, T, K, H * K)
        d = load_tile(dbegun + head * K, t, kc, T, K, H * K) * (strength * into)[:, None]
        d += load_tile(dk_read + head * K, t, kc, T, K, H * K)
        d = tl.dot(both_ways, kt, d, input_precision=PRECISION)
        store_tile(dk + head * K, d, t, kc, T, K, H * K)
