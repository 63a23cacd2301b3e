"""Kernels of chunkwise linear attention, and of what reads and writes states as it does.

B rows, T tokens, H heads, K key width, V value width; n chunks of C tokens; BK, BV columns of a
tile.

Five kernels: the states before the chunks (in order) and the outputs (all chunks at once); their
gradients' states (in reverse order), and the gradients of queries, keys and decays, and of values
(all chunks at once). Scores are computed again wherever they are used, states in the backward. A
decay by channel has two more, for scores and their gradients, which other kernels then read.

Source of the chunk form: Yang et al. 2023 (arXiv:2312.06635), section 4; Dao and Gu 2024
(arXiv:2405.21060), section 6.
"""

# Triton's types are those of Python, not of its language.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.tiles_triton import (
    CHANNEL,
    CONSTANT,
    LEVELS,
    NONE,
    SCALAR,
    C,
    after,
    decay_between,
    halves,
    load_log_decay,
    load_tile,
    log_into,
    log_out,
    not_after,
    own_decays,
    place,
    split,
    store_tile,
    sum_before,
    sum_where,
)


@triton.jit
def _of_head(g, head, h, K: tl.constexpr, DECAY: tl.constexpr):
    """Pointer to the decays of head ``h``; its first token is number ``head`` of (B, T, H)."""
    if DECAY == CONSTANT:
        return g + h
    elif DECAY == CHANNEL:
        return g + head * K
    else:
        return g + head


@triton.jit
def channel_scores(
    q, k, g, scores, T, H,
    K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `(C, C)` of one chunk whose channels each have their decay, 0 for i < j."""
    c, bh, head = place(T, H, 1)
    head *= K
    index = tl.arange(0, C)
    t = c * C + index
    a = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
        kc = first + tl.arange(0, BK)
        qt = load_tile(q + head, t, kc, T, K, H * K).to(tl.float32)
        kt = load_tile(k + head, t, kc, T, K, H * K).to(tl.float32)
        own = own_decays(g + head, t, kc, T, K, H * K)
        a += tl.where(index[:, None] == index[None, :], tl.sum(qt * kt, 1)[:, None], 0.0)
        for level in range(LEVELS):
            second, divided, between = halves(1 << level)
            mixed = tl.where(second, qt, kt) * tl.exp(sum_where(between, own))
            mixed = mixed.to(q.dtype.element_ty)
            part = tl.dot(mixed, tl.trans(mixed), input_precision=PRECISION)
            a += tl.where(divided & second, part, 0.0)
    scores += (bh * tl.cdiv(T, C) + c) * C * C
    store_tile(scores, a, index, index, C, C, C)


@triton.jit
def states_forward(
    k, v, g, initial, states, final, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, BEGUN: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State `(K, V)` before every chunk, and after the last one."""
    kc = tl.program_id(0) * BK + tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    _, bh, head = place(T, H, 2)
    n = tl.cdiv(T, C)
    k, v, g = k + head * K, v + head * V, _of_head(g, head, bh % H, K, DECAY)
    states += bh * n * K * V
    S = tl.zeros((BK, BV), tl.float32)
    if BEGUN:
        S += load_tile(initial + bh * K * V, kc, vc, K, V, V)
    for c in range(n):
        store_tile(states, S, kc, vc, K, V, V)
        states += K * V
        t = c * C + tl.arange(0, C)
        kt = load_tile(k, t, kc, T, K, H * K)
        vt = load_tile(v, t, vc, T, V, H * V)
        if DECAY == CHANNEL:
            S *= tl.exp(tl.sum(load_tile(g, t, kc, T, K, H * K).to(tl.float32), 0))[:, None]
            out = sum_where(after(), own_decays(g, t, kc, T, K, H * K))
            kt = (kt * tl.exp(out)).to(kt.dtype)
        elif DECAY != NONE:
            S *= tl.exp(tl.sum(load_log_decay(g, t, T, H, DECAY), 0))
            vt = (vt * tl.exp(log_out(g, t, T, H, DECAY))[:, None]).to(vt.dtype)
        S = tl.dot(tl.trans(kt), vt, S, input_precision=PRECISION)
    store_tile(final + bh * K * V, S, kc, vc, K, V, V)


@triton.jit
def outputs(
    q, k, v, g, given, states, o, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs `(C, BV)` of one chunk; scores by channel are ``given``."""
    vc = tl.program_id(0) * BV + tl.arange(0, BV)
    c, bh, head = place(T, H, 2)
    g = _of_head(g, head, bh % H, K, DECAY)
    chunk = bh * tl.cdiv(T, C) + c
    states += chunk * K * V
    index = tl.arange(0, C)
    t = c * C + index
    scores = tl.zeros((C, C), tl.float32)
    y = tl.zeros((C, BV), tl.float32)
    for first in range(0, K, BK):
        kc = first + tl.arange(0, BK)
        qt = load_tile(q + head * K, t, kc, T, K, H * K)
        S = load_tile(states, kc, vc, K, V, V).to(qt.dtype)
        if DECAY == CHANNEL:
            into = sum_where(not_after(), own_decays(g, t, kc, T, K, H * K))
            qt = (qt * tl.exp(into)).to(qt.dtype)
        else:
            kt = load_tile(k + head * K, t, kc, T, K, H * K)
            scores = tl.dot(qt, tl.trans(kt), scores, input_precision=PRECISION)
        y = tl.dot(qt, S, y, input_precision=PRECISION)
    if DECAY == CONSTANT or DECAY == SCALAR:
        y *= tl.exp(log_into(g, t, T, H, DECAY))[:, None]
    if DECAY == CHANNEL:
        scores += load_tile(given + chunk * C * C, index, index, C, C, C)
    else:
        scores *= decay_between(g, t, T, H, DECAY)
    vt = load_tile(v + head * V, t, vc, T, V, H * V)
    y = tl.dot(scores.to(vt.dtype), vt, y, input_precision=PRECISION)
    store_tile(o + head * V, y * scale, t, vc, T, V, H * V)


@triton.jit
def states_backward(
    q, g, do, dfinal, dstates, dinitial, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, ENDED: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient `(K, V)` of the state after every chunk, and of the initial one.

    ``dfinal`` is that of the last one, where there is one (ENDED).
    """
    kc = tl.program_id(0) * BK + tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    _, bh, head = place(T, H, 2)
    n = tl.cdiv(T, C)
    q, do, g = q + head * K, do + head * V, _of_head(g, head, bh % H, K, DECAY)
    dstates += (bh + 1) * n * K * V
    dS = tl.zeros((BK, BV), tl.float32)
    if ENDED:
        dS += load_tile(dfinal + bh * K * V, kc, vc, K, V, V)
    for c in range(n):
        dstates -= K * V
        store_tile(dstates, dS, kc, vc, K, V, V)
        t = (n - 1 - c) * C + tl.arange(0, C)
        qt = load_tile(q, t, kc, T, K, H * K)
        dy = load_tile(do, t, vc, T, V, H * V).to(tl.float32)
        if DECAY == CHANNEL:
            into = sum_where(not_after(), own_decays(g, t, kc, T, K, H * K))
            dS *= tl.exp(tl.min(into, 0))[:, None]
            qt = (qt * tl.exp(into)).to(qt.dtype)
        elif DECAY != NONE:
            into = log_into(g, t, T, H, DECAY)
            dS *= tl.exp(tl.min(into, 0))
            dy *= tl.exp(into)[:, None]
        dS = tl.dot(tl.trans(qt), dy.to(qt.dtype), dS, input_precision=PRECISION)
    store_tile(dinitial + bh * K * V, dS, kc, vc, K, V, V)


@triton.jit
def channel_scores_backward(
    v, do, dscores, T, H,
    V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient `(C, C)` of one chunk's scores between tokens, both ways: that of i, j and j, i."""
    c, bh, head = place(T, H, 1)
    head *= V
    index = tl.arange(0, C)
    t = c * C + index
    d = tl.zeros((C, C), tl.float32)
    for first in range(0, V, BV):
        vc = first + tl.arange(0, BV)
        vt = load_tile(v + head, t, vc, T, V, H * V)
        dy = load_tile(do + head, t, vc, T, V, H * V).to(vt.dtype)
        d = tl.dot(dy, tl.trans(vt), d, input_precision=PRECISION)
    d = tl.where(after(), 0.0, d)
    dscores += (bh * tl.cdiv(T, C) + c) * C * C
    store_tile(dscores, d + tl.trans(d), index, index, C, C, C)


@triton.jit
def queries_keys_backward(
    q, k, v, g, given, states, dstates, do, dq, dk, dg, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients `(C, BK)` of one chunk's queries and keys, and of its log decays.

    Those of scores by channel are ``given``, both ways. Those of decays by channel are whole, of
    others this tile's share. A log decay is in every
    factor between a token before it and a token not before it. Factors of a token with itself
    are 1 and left out, or their large terms would cancel but for rounding.
    """
    kc = tl.program_id(0) * BK + tl.arange(0, BK)
    c, bh, head = place(T, H, 2)
    g = _of_head(g, head, bh % H, K, DECAY)
    chunk = bh * tl.cdiv(T, C) + c
    at = chunk * K * V
    index = tl.arange(0, C)
    t = c * C + index
    dscores = tl.zeros((C, C), tl.float32)
    same = tl.zeros((C,), tl.float32)  # of each token's score with itself
    read = tl.zeros((C, BK), tl.float32)  # of the queries, through the state before the chunk
    kept = tl.zeros((C, BK), tl.float32)  # of the keys, through the state after it
    whole = tl.zeros((BK,), tl.float32)  # of the decay over the whole chunk
    for first in range(0, V, BV):
        vc = first + tl.arange(0, BV)
        vt = load_tile(v + head * V, t, vc, T, V, H * V)
        dy = load_tile(do + head * V, t, vc, T, V, H * V).to(vt.dtype)
        S = load_tile(states + at, kc, vc, K, V, V)
        dS = load_tile(dstates + at, kc, vc, K, V, V)
        if DECAY != NONE:
            whole += tl.sum(S * dS, 1)
        if DECAY == CHANNEL:
            same += tl.sum(dy.to(tl.float32) * vt.to(tl.float32), 1)
        else:
            dscores = tl.dot(dy, tl.trans(vt), dscores, input_precision=PRECISION)
        read = tl.dot(dy, tl.trans(S.to(vt.dtype)), read, input_precision=PRECISION)
        kept = tl.dot(vt, tl.trans(dS.to(vt.dtype)), kept, input_precision=PRECISION)
    qt = load_tile(q + head * K, t, kc, T, K, H * K)
    kt = load_tile(k + head * K, t, kc, T, K, H * K)
    wide_q, wide_k = qt.to(tl.float32), kt.to(tl.float32)
    later_q = tl.zeros((C, BK), tl.float32)  # of queries, through the scores of earlier keys
    earlier_k = tl.zeros((C, BK), tl.float32)  # of keys, through the scores of later queries
    if DECAY == CHANNEL:
        own = own_decays(g, t, kc, T, K, H * K)
        into = sum_where(not_after(), own)
        whole *= tl.exp(tl.min(into, 0))
        read *= tl.exp(into)
        kept *= tl.exp(sum_where(after(), own))
        rate = sum_where(tl.trans(after()), split(wide_k * kept)) + whole[None, :]
        both_ways = load_tile(given + chunk * C * C, index, index, C, C, C)
        for level in range(LEVELS):
            second, divided, between = halves(1 << level)
            factor = tl.exp(sum_where(between, own))
            mixed = (tl.where(second, wide_q, wide_k) * factor).to(qt.dtype)
            d = tl.where(divided, both_ways, 0.0).to(qt.dtype)
            part = tl.dot(d, mixed, input_precision=PRECISION) * factor
            later_q += tl.where(second, part, 0.0)
            earlier_k += tl.where(second, 0.0, part)
        moved = split(wide_q * (later_q + read) - wide_k * earlier_k)
        rate += sum_where(tl.trans(not_after()), moved)
        store_tile(dg + head * K, rate, t, kc, T, K, H * K)
    else:
        same = tl.sum(tl.where(index[:, None] == index[None, :], dscores, 0.0), 1)
        strict = tl.where(index[:, None] > index[None, :], dscores, 0.0)
        if DECAY != NONE:
            into = log_into(g, t, T, H, DECAY)
            strict *= decay_between(g, t, T, H, DECAY)
            read *= tl.exp(into)[:, None]
            kept *= tl.exp(log_out(g, t, T, H, DECAY))[:, None]
        d = strict.to(qt.dtype)
        later_q = tl.dot(d, kt, later_q, input_precision=PRECISION)
        earlier_k = tl.dot(tl.trans(d), qt, earlier_k, input_precision=PRECISION)
        if DECAY != NONE:
            rate = tl.sum(wide_q * (later_q + read) - wide_k * earlier_k, 1)
            rate = tl.cumsum(rate, 0, reverse=True) + sum_before(tl.sum(wide_k * kept, 1))
            rate += tl.sum(whole, 0) * tl.exp(tl.min(into, 0))
            share = dg + tl.program_id(0).to(tl.int64) * (tl.num_programs(2) * T)
            tl.store(share + head + t * H, rate, mask=t < T)
    store_tile(dq + head * K, later_q + read + same[:, None] * wide_k, t, kc, T, K, H * K)
    store_tile(dk + head * K, earlier_k + kept + same[:, None] * wide_q, t, kc, T, K, H * K)


@triton.jit
def values_backward(
    q, k, g, given, dstates, do, dv, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients `(C, BV)` of one chunk's values: through outputs and, if KEPT, the state after."""
    vc = tl.program_id(0) * BV + tl.arange(0, BV)
    c, bh, head = place(T, H, 2)
    g = _of_head(g, head, bh % H, K, DECAY)
    chunk = bh * tl.cdiv(T, C) + c
    dstates += chunk * K * V
    index = tl.arange(0, C)
    t = c * C + index
    scores = tl.zeros((C, C), tl.float32)
    d = tl.zeros((C, BV), tl.float32)
    for first in range(0, K, BK):
        kc = first + tl.arange(0, BK)
        kt = load_tile(k + head * K, t, kc, T, K, H * K)
        if DECAY == CHANNEL:
            out = sum_where(after(), own_decays(g, t, kc, T, K, H * K))
            kt = (kt * tl.exp(out)).to(kt.dtype)
        else:
            qt = load_tile(q + head * K, t, kc, T, K, H * K)
            scores = tl.dot(qt, tl.trans(kt), scores, input_precision=PRECISION)
        if KEPT:
            dS = load_tile(dstates, kc, vc, K, V, V).to(kt.dtype)
            d = tl.dot(kt, dS, d, input_precision=PRECISION)
    if DECAY == CONSTANT or DECAY == SCALAR:
        d *= tl.exp(log_out(g, t, T, H, DECAY))[:, None]
    if DECAY == CHANNEL:
        scores += load_tile(given + chunk * C * C, index, index, C, C, C)
    else:
        scores *= decay_between(g, t, T, H, DECAY)
    dy = load_tile(do + head * V, t, vc, T, V, H * V).to(q.dtype.element_ty)
    d = tl.dot(tl.trans(scores.to(dy.dtype)), dy, d, input_precision=PRECISION)
    store_tile(dv + head * V, d, t, vc, T, V, H * V)
