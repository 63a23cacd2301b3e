"""Chunkwise linear attention on the GPU. B rows, T tokens, H heads, K key width, V value width; n
chunks of C tokens; BK, BV columns of a tile.

Five kernels: the states before the chunks (in order) and the outputs (all chunks at once); their
gradients' states (in reverse order), and the gradients of queries, keys and decays, and of values
(all chunks at once). Scores are computed again wherever they are used, states in the backward.

Source of the chunk form: Yang et al. 2023 (arXiv:2312.06635), section 4; Dao and Gu 2024
(arXiv:2405.21060), section 6.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.tiles_triton import (
    CHANNEL,
    CHUNK,
    CONSTANT,
    NONE,
    SCALAR,
    block,
    decay_between,
    load_log_decay,
    load_tile,
    log_into,
    log_out,
    narrow,
    store_tile,
    sum_before,
)


@triton.jit
def _of_head(g, head, h, K: tl.constexpr, DECAY: tl.constexpr):
    """Pointer to the decays of head ``h``; its first token is place ``head`` of (B, T, H)."""
    if DECAY == CONSTANT:
        return g + h
    elif DECAY == CHANNEL:
        return g + head * K
    else:
        return g + head


@triton.jit
def _channel_out(g, t, kc, T, K, stride, C: tl.constexpr):
    """Log decay `(C, BK)` from each token to the chunk's end, by channel."""
    later = load_tile(g, t + 1, kc, T, K, stride).to(tl.float32)
    return tl.cumsum(tl.where(tl.arange(0, C)[:, None] < C - 1, later, 0.0), 0, reverse=True)


@triton.jit
def _halves(own, later, HALF: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """Decays `(C, BK)` to each token from the begin of its block of HALF tokens, and to that
    block's end; ``later`` are the log decays ``own`` of the next tokens.

    Every pair of tokens is divided by exactly one border between two such blocks, for HALF = 1, 2,
    .. C / 2: a product of a factor to that border and one from it, neither of which overflows.
    """
    shape: tl.constexpr = (C // HALF, HALF, BK)
    inner = tl.where((tl.arange(0, C)[:, None] + 1) % HALF > 0, later, 0.0)
    late = tl.cumsum(tl.reshape(own, shape), 1)
    early = tl.cumsum(tl.reshape(inner, shape), 1, reverse=True)
    return tl.exp(tl.reshape(late, (C, BK))), tl.exp(tl.reshape(early, (C, BK)))


@triton.jit
def _divided(HALF: tl.constexpr, C: tl.constexpr):
    """`(C, C)`: where i is in the second and j in the first half of one block of 2 HALF tokens."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i // (2 * HALF) == j // (2 * HALF)) & (i // HALF % 2 == 1) & (j // HALF % 2 == 0)


@triton.jit
def _channel_scores(
    q,
    k,
    own,
    later,
    C: tl.constexpr,
    BK: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`(C, C)` scores of a tile of channels, each with its own decay."""
    place = tl.arange(0, C)
    wide_q, wide_k = q.to(tl.float32), k.to(tl.float32)
    scores = tl.where(place[:, None] == place[None, :], tl.sum(wide_q * wide_k, 1)[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        late, early = _halves(own, later, 1 << level, C, BK)
        part = tl.dot(
            (wide_q * late).to(q.dtype),
            tl.trans((wide_k * early).to(q.dtype)),
            input_precision=PRECISION,
        )
        scores += tl.where(_divided(1 << level, C), part, 0.0)
    return scores


@triton.jit
def _states(
    k, v, g, initial, states, final, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, BEGUN: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State `(K, V)` before every chunk, and after the last one."""
    kc = tl.program_id(0) * BK + tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    bh = tl.program_id(2).to(tl.int64)
    head = bh // H * T * H + bh % H  # of the row's first token
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
            kt = (kt * tl.exp(_channel_out(g, t, kc, T, K, H * K, C))).to(kt.dtype)
        elif DECAY != NONE:
            S *= tl.exp(tl.sum(load_log_decay(g, t, T, H, DECAY), 0))
            vt = (vt * tl.exp(log_out(g, t, T, H, DECAY, C))[:, None]).to(vt.dtype)
        S = tl.dot(tl.trans(kt), vt, S, input_precision=PRECISION)
    store_tile(final + bh * K * V, S, kc, vc, K, V, V)


@triton.jit
def _outputs(
    q, k, v, g, states, o, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs `(C, BV)` of one chunk."""
    vc = tl.program_id(0) * BV + tl.arange(0, BV)
    c = tl.program_id(1).to(tl.int64)
    bh = tl.program_id(2).to(tl.int64)
    head = bh // H * T * H + bh % H
    g = _of_head(g, head, bh % H, K, DECAY)
    states += (bh * tl.cdiv(T, C) + c) * K * V
    t = c * C + tl.arange(0, C)
    scores = tl.zeros((C, C), tl.float32)
    y = tl.zeros((C, BV), tl.float32)
    for first in range(0, K, BK):
        kc = first + tl.arange(0, BK)
        qt = load_tile(q + head * K, t, kc, T, K, H * K)
        kt = load_tile(k + head * K, t, kc, T, K, H * K)
        S = load_tile(states, kc, vc, K, V, V).to(qt.dtype)
        if DECAY == CHANNEL:
            own = load_tile(g, t, kc, T, K, H * K).to(tl.float32)
            later = load_tile(g, t + 1, kc, T, K, H * K).to(tl.float32)
            scores += _channel_scores(qt, kt, own, later, C, BK, LEVELS, PRECISION)
            qt = (qt * tl.exp(tl.cumsum(own, 0))).to(qt.dtype)
        else:
            scores = tl.dot(qt, tl.trans(kt), scores, input_precision=PRECISION)
        y = tl.dot(qt, S, y, input_precision=PRECISION)
    if DECAY == CONSTANT or DECAY == SCALAR:
        y *= tl.exp(log_into(g, t, T, H, DECAY))[:, None]
    if DECAY != CHANNEL:
        scores *= decay_between(g, t, T, H, DECAY, C)
    vt = load_tile(v + head * V, t, vc, T, V, H * V)
    y = tl.dot(scores.to(vt.dtype), vt, y, input_precision=PRECISION)
    store_tile(o + head * V, y, t, vc, T, V, H * V)


@triton.jit
def _states_backward(
    q, g, do, dfinal, dstates, dinitial, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient `(K, V)` of the state after every chunk, and of the initial one."""
    kc = tl.program_id(0) * BK + tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    bh = tl.program_id(2).to(tl.int64)
    head = bh // H * T * H + bh % H
    n = tl.cdiv(T, C)
    q, do, g = q + head * K, do + head * V, _of_head(g, head, bh % H, K, DECAY)
    dstates += (bh + 1) * n * K * V
    dS = tl.zeros((BK, BV), tl.float32) + load_tile(dfinal + bh * K * V, kc, vc, K, V, V)
    for c in range(n):
        dstates -= K * V
        store_tile(dstates, dS, kc, vc, K, V, V)
        t = (n - 1 - c) * C + tl.arange(0, C)
        qt = load_tile(q, t, kc, T, K, H * K)
        dy = load_tile(do, t, vc, T, V, H * V)
        if DECAY == CHANNEL:
            into = tl.cumsum(load_tile(g, t, kc, T, K, H * K).to(tl.float32), 0)
            dS *= tl.exp(tl.min(into, 0))[:, None]
            qt = (qt * tl.exp(into)).to(qt.dtype)
        elif DECAY != NONE:
            into = log_into(g, t, T, H, DECAY)
            dS *= tl.exp(tl.min(into, 0))
            dy *= tl.exp(into)[:, None]
        dS = tl.dot(tl.trans(qt), dy.to(qt.dtype), dS, input_precision=PRECISION)
    store_tile(dinitial + bh * K * V, dS, kc, vc, K, V, V)


@triton.jit
def _queries_keys_backward(
    q, k, v, g, states, dstates, do, dq, dk, dg, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients `(C, BK)` of one chunk's queries and keys, and of its log decays: those by channel,
    or this tile's share of the others.

    A log decay is in every factor between a place before it and a place not before it. Factors of
    a place with itself are 1 and left out, or their large terms would cancel but for rounding.
    """
    kc = tl.program_id(0) * BK + tl.arange(0, BK)
    c = tl.program_id(1).to(tl.int64)
    bh = tl.program_id(2).to(tl.int64)
    head = bh // H * T * H + bh % H
    g = _of_head(g, head, bh % H, K, DECAY)
    at = (bh * tl.cdiv(T, C) + c) * K * V
    place = tl.arange(0, C)
    t = c * C + place
    dscores = tl.zeros((C, C), tl.float32)
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
        dscores = tl.dot(dy, tl.trans(vt), dscores, input_precision=PRECISION)
        read = tl.dot(dy, tl.trans(S.to(vt.dtype)), read, input_precision=PRECISION)
        kept = tl.dot(vt, tl.trans(dS.to(vt.dtype)), kept, input_precision=PRECISION)
    qt = load_tile(q + head * K, t, kc, T, K, H * K)
    kt = load_tile(k + head * K, t, kc, T, K, H * K)
    wide_q, wide_k = qt.to(tl.float32), kt.to(tl.float32)
    same = tl.sum(tl.where(place[:, None] == place[None, :], dscores, 0.0), 1)[:, None]
    later_q = tl.zeros((C, BK), tl.float32)  # of queries, through the scores of earlier keys
    earlier_k = tl.zeros((C, BK), tl.float32)  # of keys, through the scores of later queries
    if DECAY == CHANNEL:
        own = load_tile(g, t, kc, T, K, H * K).to(tl.float32)
        later = load_tile(g, t + 1, kc, T, K, H * K).to(tl.float32)
        for level in tl.static_range(LEVELS):
            late, early = _halves(own, later, 1 << level, C, BK)
            d = tl.where(_divided(1 << level, C), dscores, 0.0).to(qt.dtype)
            part_k, part_q = (wide_k * early).to(qt.dtype), (wide_q * late).to(qt.dtype)
            later_q += tl.dot(d, part_k, input_precision=PRECISION) * late
            earlier_k += tl.dot(tl.trans(d), part_q, input_precision=PRECISION) * early
        into = tl.cumsum(own, 0)
        whole *= tl.exp(tl.min(into, 0))
        read *= tl.exp(into)
        kept *= tl.exp(_channel_out(g, t, kc, T, K, H * K, C))
        before = (place[None, :] < place[:, None]).to(tl.float32)
        rate = tl.cumsum(wide_q * (later_q + read) - wide_k * earlier_k, 0, reverse=True)
        rate += tl.dot(before, wide_k * kept, input_precision="tf32x3") + whole[None, :]
        store_tile(dg + head * K, rate, t, kc, T, K, H * K)
    else:
        strict = tl.where(place[:, None] > place[None, :], dscores, 0.0)
        if DECAY != NONE:
            into = log_into(g, t, T, H, DECAY)
            strict *= decay_between(g, t, T, H, DECAY, C)
            read *= tl.exp(into)[:, None]
            kept *= tl.exp(log_out(g, t, T, H, DECAY, C))[:, None]
        d = strict.to(qt.dtype)
        later_q = tl.dot(d, kt, later_q, input_precision=PRECISION)
        earlier_k = tl.dot(tl.trans(d), qt, earlier_k, input_precision=PRECISION)
        if DECAY != NONE:
            rate = tl.sum(wide_q * (later_q + read) - wide_k * earlier_k, 1)
            rate = tl.cumsum(rate, 0, reverse=True) + sum_before(tl.sum(wide_k * kept, 1), C)
            rate += tl.sum(whole, 0) * tl.exp(tl.min(into, 0))
            share = dg + tl.program_id(0).to(tl.int64) * (tl.num_programs(2) * T)
            tl.store(share + head + t * H, rate, mask=t < T)
    store_tile(dq + head * K, later_q + read + same * wide_k, t, kc, T, K, H * K)
    store_tile(dk + head * K, earlier_k + kept + same * wide_q, t, kc, T, K, H * K)


@triton.jit
def _values_backward(
    q, k, g, dstates, do, dv, T, H,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients `(C, BV)` of one chunk's values."""
    vc = tl.program_id(0) * BV + tl.arange(0, BV)
    c = tl.program_id(1).to(tl.int64)
    bh = tl.program_id(2).to(tl.int64)
    head = bh // H * T * H + bh % H
    g = _of_head(g, head, bh % H, K, DECAY)
    dstates += (bh * tl.cdiv(T, C) + c) * K * V
    t = c * C + tl.arange(0, C)
    scores = tl.zeros((C, C), tl.float32)
    d = tl.zeros((C, BV), tl.float32)
    for first in range(0, K, BK):
        kc = first + tl.arange(0, BK)
        qt = load_tile(q + head * K, t, kc, T, K, H * K)
        kt = load_tile(k + head * K, t, kc, T, K, H * K)
        dS = load_tile(dstates, kc, vc, K, V, V).to(qt.dtype)
        if DECAY == CHANNEL:
            own = load_tile(g, t, kc, T, K, H * K).to(tl.float32)
            later = load_tile(g, t + 1, kc, T, K, H * K).to(tl.float32)
            scores += _channel_scores(qt, kt, own, later, C, BK, LEVELS, PRECISION)
            kt = (kt * tl.exp(_channel_out(g, t, kc, T, K, H * K, C))).to(kt.dtype)
        else:
            scores = tl.dot(qt, tl.trans(kt), scores, input_precision=PRECISION)
        d = tl.dot(kt, dS, d, input_precision=PRECISION)
    if DECAY == CONSTANT or DECAY == SCALAR:
        d *= tl.exp(log_out(g, t, T, H, DECAY, C))[:, None]
    if DECAY != CHANNEL:
        scores *= decay_between(g, t, T, H, DECAY, C)
    dy = load_tile(do + head * V, t, vc, T, V, H * V).to(q.dtype.element_ty)
    d = tl.dot(tl.trans(scores.to(dy.dtype)), dy, d, input_precision=PRECISION)
    store_tile(dv + head * V, d, t, vc, T, V, H * V)


_KINDS = {None: NONE, 1: CONSTANT, 3: SCALAR, 4: CHANNEL}


def _settings(q: Tensor, v: Tensor, g: Tensor | None) -> tuple[dict[str, Any], ...]:
    """Compile-time arguments: those of the passes over time, and those of the chunks at once."""
    K, V = q.shape[-1], v.shape[-1]
    by_channel = g is not None and g.dim() == 4
    passes = {
        "K": K,
        "V": V,
        "DECAY": _KINDS[None if g is None else g.dim()].value,
        "C": CHUNK,
        "BK": block(K, 64),
        "BV": block(V, 64),
        # Three products of the leading and remaining bits: as exact as float32, on matrix units.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else None,
        "num_warps": 4,
    }
    return passes, {**passes, "LEVELS": CHUNK.bit_length() - 1 if by_channel else 0}


def _run_states(
    k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, passes: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """States `(B, H, n, K, V)` before each chunk and the last one `(B, H, K, V)`, float32."""
    (B, T, H, K), V = k.shape, v.shape[-1]
    states = k.new_empty(B, H, triton.cdiv(T, CHUNK), K, V, dtype=torch.float32)
    final = states.new_empty(B, H, K, V)
    begun = initial is not None
    grid = triton.cdiv(K, passes["BK"]), triton.cdiv(V, passes["BV"]), B * H
    # What is not there has a pointer all the same, unused.
    _states[grid](
        k, v, k if g is None else g, initial if begun else final, states, final, T, H,
        BEGUN=begun, **passes,
    )  # fmt: skip
    return states, final


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs and last state in float32. Takes contiguous tensors, q, k, v of one dtype, none
    empty.
    """
    (B, T, H, _), V = q.shape, v.shape[-1]
    passes, chunks = _settings(q, v, g)
    states, final = _run_states(k, v, g, initial, passes)
    o = final.new_empty(B, T, H, V)
    grid = triton.cdiv(V, chunks["BV"]), states.shape[2], B * H
    _outputs[grid](q, k, v, q if g is None else g, states, o, T, H, **chunks)
    return o, final


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    do: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (empty without decay) and of the initial state."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    passes, chunks = _settings(q, v, g)
    do, dfinal = do.contiguous(), dfinal.contiguous()
    states, _ = _run_states(k, v, g, initial, passes)
    dstates, dinitial = torch.empty_like(states), torch.empty_like(dfinal)
    k_tiles, v_tiles = triton.cdiv(K, passes["BK"]), triton.cdiv(V, passes["BV"])
    some = q if g is None else g
    _states_backward[(k_tiles, v_tiles, B * H)](
        q, some, do, dfinal, dstates, dinitial, T, H, **passes
    )
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shape = () if g is None else (B, T, H, K) if g.dim() == 4 else (k_tiles, B, T, H)
    dg = do.new_empty(shape)
    grid = k_tiles, states.shape[2], B * H
    _queries_keys_backward[grid](
        q, k, v, some, states, dstates, do, dq, dk, dg, T, H, **chunks
    )  # fmt: skip
    grid = v_tiles, states.shape[2], B * H
    _values_backward[grid](q, k, some, dstates, do, dv, T, H, **chunks)
    if g is None:
        dg = q.new_empty(0)
    else:
        dg = (dg.sum((0, 1, 2)) if g.dim() == 1 else dg.sum(0) if g.dim() == 3 else dg).to(g.dtype)
    return dq, dk, dv, dg, dinitial


_forward_op = torch.library.custom_op(
    "mm::linear_attention_triton",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "mm::linear_attention_triton_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial, Tensor do, Tensor dfinal)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    o = q.new_empty(B, T, H, V, dtype=torch.float32)
    return o, o.new_empty(B, H, K, V)


@_backward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    do: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = q.new_empty(0) if g is None else torch.empty_like(g)
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        dg,
        dfinal.new_empty(dfinal.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _grads(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    *_, g, initial = ctx.saved_tensors
    dq, dk, dv, dg, dinitial = torch.ops.mm.linear_attention_triton_backward(
        *ctx.saved_tensors, do, dfinal
    )
    return dq, dk, dv, None if g is None else dg, None if initial is None else dinitial


_forward_op.register_autograd(_grads, setup_context=_setup)


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None = None,
    initial_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernels; arguments and results as those of `mm.kernels.linear_attention`.

    Products of float32 are tf32x3, those of bfloat16 and float16 have float32 sums.
    """
    q, k, v = narrow(q_BTHK, k_BTHK, v_BTHV)
    if log_decay is not None:
        log_decay = log_decay.contiguous()
    if initial_BHKV is not None:
        initial_BHKV = initial_BHKV.float().contiguous()
    return torch.ops.mm.linear_attention_triton(q, k, v, log_decay, initial_BHKV)
