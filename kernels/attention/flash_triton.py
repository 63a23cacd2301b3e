"""Attention in Triton: tiles of queries and keys, an online softmax.

Two kernels go backward (one by keys, one by queries), so that no sum depends on the order in which
programs run.

R rows, T queries, S keys, H query heads, M query heads of a key head.
"""

# Triton's stubs know neither launch options nor tensors without values.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.kernels.attention.tiles import tile

LOG2E = tl.constexpr(1.4426950408889634)
STEP = 1024  # documents that a program compares at a time with those of its tile


@triton.jit
def _of_queries(x, KEYS_FIRST: tl.constexpr):
    """What belongs to the queries of a tile, to be broadcast over it."""
    return x[None, :] if KEYS_FIRST else x[:, None]


@triton.jit
def _of_keys(x, KEYS_FIRST: tl.constexpr):
    return x[:, None] if KEYS_FIRST else x[None, :]


@triton.jit
def _scores(
    dots,
    t,
    n,
    fade_q,
    fade_k,
    document_q,
    document_k,
    prefix_q,
    prefix_k,
    r,
    h,
    T,
    S,
    window,
    scale,
    softcap,
    H: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Logits of a tile, hidden ones -inf; slope of the soft-cap; sign of the fade's distance.

    A tile is `(queries, keys)`, or `(keys, queries)` with ``KEYS_FIRST``.
    """
    s = dots * scale
    slope = s
    side = s
    if CAP:
        e = tl.exp2(tl.abs(s) * (-2.0 * LOG2E / softcap))
        bent = (1.0 - e) / (1.0 + e)
        slope = 1.0 - bent * bent
        s = tl.where(s < 0, -softcap * bent, softcap * bent)
    if fade_q is not None:
        fq = tl.load(fade_q + r * T * H + h + t * H, mask=t < T, other=0.0)
        fk = tl.load(fade_k + r * S * H + h + n * H, mask=n < S, other=0.0)
        apart = _of_queries(fq, KEYS_FIRST) - _of_keys(fk, KEYS_FIRST)
        s -= tl.abs(apart)
        side = tl.where(apart > 0, 1.0, tl.where(apart < 0, -1.0, 0.0))
    at, key = _of_queries(t + S - T, KEYS_FIRST), _of_keys(n, KEYS_FIRST)
    seen = (key < S) & (at < S)
    if CAUSAL:
        past = key <= at
        if prefix_q is not None:
            pq = _of_queries(tl.load(prefix_q + r * T + t, mask=t < T, other=0), KEYS_FIRST)
            pk = _of_keys(tl.load(prefix_k + r * S + n, mask=n < S, other=0), KEYS_FIRST)
            past = past | ((pq == pk) & (pk != 0))
        seen = seen & past
    if WINDOW:
        seen = seen & (key > at - window)
    if document_q is not None:
        dq = _of_queries(tl.load(document_q + r * T + t, mask=t < T, other=0), KEYS_FIRST)
        dk = _of_keys(tl.load(document_k + r * S + n, mask=n < S, other=0), KEYS_FIRST)
        seen = seen & (dq == dk) & (dk != 0)
    return tl.where(seen, s, -float("inf")), slope, side


@triton.jit
def _load(x, r, t, h, T, HEADS: tl.constexpr, W: tl.constexpr, B: tl.constexpr):
    """`(C, B)` of one head of `(R, T, HEADS, W)`, zero outside."""
    d = tl.arange(0, B)
    # Offsets within a row of the batch are 32 bits: half the registers of pointers.
    at = x + (r * T * HEADS + h) * W + (t[:, None] * (HEADS * W) + d[None, :])
    return tl.load(at, mask=(t < T)[:, None] & (d < W)[None, :], other=0.0)


@triton.jit
def _store(x, y, r, t, h, T, HEADS: tl.constexpr, W: tl.constexpr, B: tl.constexpr):
    d = tl.arange(0, B)
    at = x + (r * T * HEADS + h) * W + (t[:, None] * (HEADS * W) + d[None, :])
    tl.store(at, y.to(x.dtype.element_ty), mask=(t < T)[:, None] & (d < W)[None, :])


@triton.jit
def _where_met(own, others, r, first, N_OWN, N, B: tl.constexpr, STEP: tl.constexpr):
    """From where to where ``others`` hold numbers of ``own``'s tile: between its least and most.

    So a tile of documents in order meets its own ones, and in any order it misses none. 0 meets
    nothing.
    """
    i = first + tl.arange(0, B)
    x = tl.load(own + r * N_OWN + i, mask=i < N_OWN, other=0)
    least, most = tl.min(tl.where(x == 0, 2147483647, x), 0), tl.max(x, 0)
    low, high = N, 0
    for c in range(0, N, STEP):
        n = c + tl.arange(0, STEP)
        y = tl.load(others + r * N + n, mask=n < N, other=0)
        meets = (y >= least) & (y <= most) & (y != 0)
        low = tl.minimum(low, tl.min(tl.where(meets, n, N), 0))
        high = tl.maximum(high, tl.max(tl.where(meets, n + 1, 0), 0))
    return low, high


@triton.jit
def _by_place(
    i, T, S, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BY_KEYS: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Keys that tile i of B queries may see, or queries that may see a tile of keys, by place."""
    low, high = 0, T if BY_KEYS else S
    if BY_KEYS:
        if CAUSAL:
            low = tl.maximum(0, i * B - (S - T))
        if WINDOW:
            high = tl.maximum(0, tl.minimum(T, (i + 1) * B - (S - T) + window))
    else:
        if CAUSAL:
            high = tl.maximum(0, tl.minimum(S, (i + 1) * B + S - T))
        if WINDOW:
            low = tl.maximum(0, i * B + S - T - window + 1)
    return low, high


@triton.jit
def _find_ranges(
    ranges, own_document, documents, own_prefix, prefixes, T, S, window, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BY_KEYS: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`_by_place`, less what holds other documents, more what shares a prefix."""
    i, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_own, n = (S, T) if BY_KEYS else (T, S)
    low, high = _by_place(i, T, S, window, CAUSAL, WINDOW, BY_KEYS, B)
    if CAUSAL and own_prefix is not None:
        near, far = _by_place(i, T, S, window, False, WINDOW, BY_KEYS, B)
        first, end = _where_met(own_prefix, prefixes, r, i * B, n_own, n, B, STEP)
        low, high = tl.minimum(low, tl.maximum(near, first)), tl.maximum(high, tl.minimum(far, end))
    if own_document is not None:
        first, end = _where_met(own_document, documents, r, i * B, n_own, n, B, STEP)
        low, high = tl.maximum(low, first), tl.minimum(high, end)
    at = ranges + (r * tl.cdiv(n_own, B) + i) * 2
    tl.store(at, low)
    tl.store(at + 1, high)


@triton.jit
def _range(
    ranges, i, r, T, S, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BY_KEYS: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """`_find_ranges` of a tile: as it found them, or found here where no number counts."""
    if ranges is not None:
        at = ranges + (r * tl.cdiv(S if BY_KEYS else T, B) + i) * 2
        return tl.load(at), tl.load(at + 1)
    else:
        return _by_place(i, T, S, window, CAUSAL, WINDOW, BY_KEYS, B)


@triton.jit
def _forward(
    q,
    k,
    v,
    y,
    lse,
    sink,
    fade_q,
    fade_k,
    document_q,
    document_k,
    prefix_q,
    prefix_k,
    ranges,
    T,
    S,
    window,
    scale,
    softcap,
    H: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    G: tl.constexpr = H // M
    tiles = tl.cdiv(T, BM)
    # The last queries of a causal mask have the most to do: they begin first.
    i = tiles - 1 - tl.program_id(0) % tiles
    r = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = tl.program_id(0) // tiles % H
    t = i * BM + tl.arange(0, BM)
    qt = _load(q, r, t, h, T, H, K, BK)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BV), tl.float32)
    low, high = _range(ranges, i, r, T, S, window, CAUSAL, WINDOW, False, BM)
    for c in range(low // BN * BN, high, BN):
        n = c + tl.arange(0, BN)
        kt = _load(k, r, n, h // M, S, G, K, BK)
        dots = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
        s, _, _ = _scores(
            dots, t, n, fade_q, fade_k, document_q, document_k, prefix_q, prefix_k, r, h, T, S,
            window, scale, softcap, H, CAUSAL, WINDOW, CAP, False,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2((s - base[:, None]) * LOG2E)
        shrunk = tl.exp2((top - base) * LOG2E)
        total = total * shrunk + tl.sum(p, 1)
        vt = _load(v, r, n, h // M, S, G, V, BV)
        out = tl.dot(p.to(vt.dtype), vt, out * shrunk[:, None], input_precision=PRECISION)
        top = new
    if sink is not None:
        logit = tl.load(sink + h)
        new = tl.maximum(top, logit)
        shrunk = tl.exp2((top - new) * LOG2E)
        total = total * shrunk + tl.exp2((logit - new) * LOG2E)
        out = out * shrunk[:, None]
        top = new
    empty = total == 0
    out = out / tl.where(empty, 1.0, total)[:, None]
    _store(y, out, r, t, h, T, H, V, BV)
    ends = tl.where(empty, 0.0, top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse + (r * H + h) * T + t, ends, mask=t < T)


@triton.jit
def _dscores(
    qt, kt, vt, dyt, ends, dots_y, t, n, fade_q, fade_k, document_q, document_k, prefix_q, prefix_k,
    r, h, T, S, window, scale, softcap, H: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return the probabilities of a tile, the gradients of its scores, and the sign of its fade.

    The gradients are those before and after the soft-cap; the sign is what `_scores` says of
    the fade.
    """
    if KEYS_FIRST:
        dots = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
    else:
        dots = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    s, slope, side = _scores(
        dots, t, n, fade_q, fade_k, document_q, document_k, prefix_q, prefix_k, r, h, T, S, window,
        scale, softcap, H, CAUSAL, WINDOW, CAP, KEYS_FIRST,
    )  # fmt: skip
    p = tl.exp2((s - _of_queries(ends, KEYS_FIRST)) * LOG2E)
    if KEYS_FIRST:
        dp = tl.dot(vt, tl.trans(dyt), input_precision=PRECISION)
    else:
        dp = tl.dot(dyt, tl.trans(vt), input_precision=PRECISION)
    capped = p * (dp - _of_queries(dots_y, KEYS_FIRST))
    return p, capped * slope if CAP else capped, capped, side


@triton.jit
def _dots_with_outputs(
    y, dy, delta, T, H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr
):
    """Products `(R, H, T)` of each output with its gradient."""
    tiles = tl.cdiv(T, BM)
    r = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = tl.program_id(0) // tiles % H
    t = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    yt = _load(y, r, t, h, T, H, V, BV).to(tl.float32)
    dyt = _load(dy, r, t, h, T, H, V, BV).to(tl.float32)
    tl.store(delta + (r * H + h) * T + t, tl.sum(yt * dyt, 1), mask=t < T)


@triton.jit
def _by_queries(
    q,
    k,
    v,
    dy,
    lse,
    delta,
    dq,
    dfade_q,
    fade_q,
    fade_k,
    document_q,
    document_k,
    prefix_q,
    prefix_k,
    ranges,
    T,
    S,
    window,
    scale,
    softcap,
    H: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    G: tl.constexpr = H // M
    tiles = tl.cdiv(T, BM)
    i = tiles - 1 - tl.program_id(0) % tiles
    r = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = tl.program_id(0) // tiles % H
    t = i * BM + tl.arange(0, BM)
    qt, dyt = _load(q, r, t, h, T, H, K, BK), _load(dy, r, t, h, T, H, V, BV)
    ends = tl.load(lse + (r * H + h) * T + t, mask=t < T, other=0.0)
    dots_y = tl.load(delta + (r * H + h) * T + t, mask=t < T, other=0.0)
    own = tl.zeros((BM, BK), tl.float32)
    faded = tl.zeros((BM,), tl.float32)
    low, high = _range(ranges, i, r, T, S, window, CAUSAL, WINDOW, False, BM)
    for c in range(low // BN * BN, high, BN):
        n = c + tl.arange(0, BN)
        kt, vt = _load(k, r, n, h // M, S, G, K, BK), _load(v, r, n, h // M, S, G, V, BV)
        _, ds, capped, side = _dscores(
            qt, kt, vt, dyt, ends, dots_y, t, n, fade_q, fade_k, document_q, document_k, prefix_q,
            prefix_k, r, h, T, S, window, scale, softcap, H, CAUSAL, WINDOW, CAP, PRECISION, False,
        )  # fmt: skip
        if fade_q is not None:
            faded -= tl.sum(capped * side, 1)
        own = tl.dot(ds.to(kt.dtype), kt, own, input_precision=PRECISION)
    _store(dq, own * scale, r, t, h, T, H, K, BK)
    if fade_q is not None:
        tl.store(dfade_q + r * T * H + h + t * H, faded, mask=t < T)


@triton.jit
def _by_keys(
    q,
    k,
    v,
    dy,
    lse,
    delta,
    dk,
    dv,
    dfade_k,
    fade_q,
    fade_k,
    document_q,
    document_k,
    prefix_q,
    prefix_k,
    ranges,
    T,
    S,
    window,
    scale,
    softcap,
    H: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    G: tl.constexpr = H // M
    tiles = tl.cdiv(S, BN)
    j = tl.program_id(0) % tiles
    r = (tl.program_id(0) // tiles // G).to(tl.int64)
    g = tl.program_id(0) // tiles % G
    n = j * BN + tl.arange(0, BN)
    kt, vt = _load(k, r, n, g, S, G, K, BK), _load(v, r, n, g, S, G, V, BV)
    dkt, dvt = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BV), tl.float32)
    low, high = _range(ranges, j, r, T, S, window, CAUSAL, WINDOW, True, BN)
    # Heads of the group one after the other: their sum has one order.
    for m in range(0, M):
        h = g * M + m
        faded = tl.zeros((BN,), tl.float32)
        for a in range(low // BM * BM, high, BM):
            t = a + tl.arange(0, BM)
            qt, dyt = _load(q, r, t, h, T, H, K, BK), _load(dy, r, t, h, T, H, V, BV)
            ends = tl.load(lse + (r * H + h) * T + t, mask=t < T, other=0.0)
            dots_y = tl.load(delta + (r * H + h) * T + t, mask=t < T, other=0.0)
            p, ds, capped, side = _dscores(
                qt, kt, vt, dyt, ends, dots_y, t, n, fade_q, fade_k, document_q, document_k,
                prefix_q, prefix_k, r, h, T, S, window, scale, softcap, H, CAUSAL, WINDOW, CAP,
                PRECISION, KEYS_FIRST,
            )  # fmt: skip
            p, ds = p.to(dyt.dtype), ds.to(qt.dtype)
            if not KEYS_FIRST:
                p, ds = tl.trans(p), tl.trans(ds)
            dvt = tl.dot(p, dyt, dvt, input_precision=PRECISION)
            if fade_q is not None:
                faded += tl.sum(capped * side, 1 if KEYS_FIRST else 0)
            dkt = tl.dot(ds, qt, dkt, input_precision=PRECISION)
        if fade_q is not None:
            tl.store(dfade_k + r * S * H + h + n * H, faded, mask=n < S)
    _store(dk, dkt * scale, r, n, g, S, G, K, BK)
    _store(dv, dvt, r, n, g, S, G, V, BV)


class _Call:
    """Operands as the kernels read them, and the arguments that all kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec):
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        self.q, self.k, self.v = (x.to(dtype).contiguous() for x in (q, k, v))
        self.R, self.T, self.H, self.K = q.shape
        self.S, self.G, self.V = v.shape[1], v.shape[2], v.shape[3]
        flat = lambda x, kind: None if x is None else x.to(kind).contiguous()
        self.fade = (flat(score.fade_RTH, torch.float32), flat(score.fade_RSH, torch.float32))
        self.document = tuple(flat(x, torch.int32) for x in (mask.document_RT, mask.document_RS))
        self.prefix = tuple(flat(x, torch.int32) for x in (mask.prefix_RT, mask.prefix_RS))
        if None in self.document:  # one side without the other counts as unset
            self.document = (None, None)
        if None in self.prefix or not mask.causal:
            self.prefix = (None, None)
        self.sink = flat(score.sink_H, torch.float32)
        self.causal, self.window = mask.causal, mask.window or 0
        self.scale, self.softcap = score.factor(self.K), score.softcap or 0.0

    def find_ranges(self, by_keys: bool, tile: int, tiles: int) -> Tensor | None:
        """`(R, tiles, 2)` int32 of `_find_ranges`, None where places alone tell."""
        sides = (*self.document, *self.prefix)
        if sides == (None,) * 4:
            return None
        if by_keys:
            sides = (*sides[1::-1], *sides[:1:-1])
        ranges = self.q.new_empty(self.R, tiles, 2, dtype=torch.int32)
        _find_ranges[(tiles, self.R)](
            ranges, *sides, self.T, self.S, self.window, self.causal, self.window > 0, by_keys,
            tile, STEP, num_warps=4,
        )  # fmt: skip
        return ranges

    def launch(self, kernel: Any, way: str, *tensors: Tensor | None) -> None:
        BK, BV = (max(16, triton.next_power_of_2(n)) for n in (self.K, self.V))
        rich = self.fade != (None, None) or self.softcap > 0
        BM, BN, warps, stages = tile(max(BK, BV), self.q.element_size(), way, rich)
        own = (self.S, BN, self.G) if way == "keys" else (self.T, BM, self.H)
        tiles = triton.cdiv(own[0], own[1])
        ranges = self.find_ranges(way == "keys", own[1], tiles)
        kernel[(tiles * self.R * own[2],)](
            self.q,
            self.k,
            self.v,
            *tensors,
            *self.fade,
            *self.document,
            *self.prefix,
            ranges,
            self.T,
            self.S,
            self.window,
            self.scale,
            self.softcap,
            self.H,
            self.H // self.G,
            self.K,
            self.V,
            BK,
            BV,
            self.causal,
            self.window > 0,
            self.softcap > 0,
            "tf32x3" if self.q.dtype == torch.float32 else "ieee",
            BM=BM,
            BN=BN,
            **({"KEYS_FIRST": max(BK, BV) <= 128} if way == "keys" else {}),
            num_warps=warps,
            num_stages=stages,
        )


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec
) -> tuple[Tensor, Tensor]:
    """`mm.kernels.attention.blocks.forward`; no allowed, bias or relative."""
    call = _Call(q, k, v, mask, score)
    y = call.v.new_empty(call.R, call.T, call.H, call.V)
    lse = y.new_empty(call.R, call.H, call.T, dtype=torch.float32)
    call.launch(_forward, "forward", y, lse, call.sink)
    return y.to(v.dtype), lse.view(call.R * call.G, -1, call.T, 1)


def backward(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec,
    y: Tensor, lse: Tensor, dy: Tensor, need: Collection[str],
) -> dict[str, Tensor]:  # fmt: skip
    """`mm.kernels.attention.blocks.backward`."""
    call = _Call(q, k, v, mask, score)
    dy = dy.to(call.q.dtype).contiguous()
    lse = lse.view(call.R, call.H, call.T)
    delta = torch.empty_like(lse)
    BV = max(16, triton.next_power_of_2(call.V))
    BM = min(128, 4096 // BV)
    _dots_with_outputs[(triton.cdiv(call.T, BM) * call.R * call.H,)](
        y.contiguous(), dy, delta, call.T, call.H, call.V, BV, BM, num_warps=4
    )
    dq, dk, dv = (torch.empty_like(x) for x in (call.q, call.k, call.v))
    faded = tuple(None if x is None else torch.empty_like(x) for x in call.fade)
    call.launch(_by_queries, "queries", dy, lse, delta, dq, faded[0])
    call.launch(_by_keys, "keys", dy, lse, delta, dk, dv, faded[1])
    made = {"q": dq.to(q.dtype), "k": dk.to(k.dtype), "v": dv.to(v.dtype)}
    for name, grad in zip(("fade_RTH", "fade_RSH"), faded, strict=True):
        if name in need and grad is not None:
            made[name] = grad.to(getattr(score, name).dtype)
    if "sink_H" in need and score.sink_H is not None and call.sink is not None:
        p = (call.sink[:, None] - lse).exp()
        made["sink_H"] = -(p * delta).sum((0, 2)).to(score.sink_H.dtype)
    return made
