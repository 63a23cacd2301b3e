"""Attention in Triton: tiles of queries and keys, an online softmax.

Two kernels go backward (one by keys, one by queries), so that no sum depends on the order in which
programs run.

R rows, T queries, S keys, H query heads, M query heads of a key head.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.attention.spec import MaskSpec, ScoreSpec

LOG2E = tl.constexpr(1.4426950408889634)


def tile(width: int, item: int, way: str) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, stages: what fits registers and shared memory.

    Of sm_80, sm_90 and sm_100, with all settings on: `tests/kernels/test_launches.py`.

    Args:
        width: of the wider of keys and values, a power of two.
        item: bytes of an element.
        way: "forward", "queries" or "keys".
    """
    if item == 4:
        if width <= 64:
            return (32, 32, 8, 1)
        return {"forward": (32, 16, 8, 1), "queries": (16, 16, 4, 1), "keys": (16, 16, 8, 1)}[way]
    if way == "keys":  # 64 queries at a time spill
        return (32, 64, 8, 1)
    if width > 128:
        return (64, 32, 8, 2)
    if way == "forward":
        return (128, 128, 8, 3) if width <= 64 else (128, 64, 8, 3)
    return (128, 64, 8, 2)


@triton.jit
def _scores(
    dots,
    t,
    n,
    fade_q,
    fade_k,
    document_q,
    document_k,
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
):
    """Logits of a tile, hidden ones -inf; slope of the soft-cap; sign of the fade's distance."""
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
        apart = fq[:, None] - fk[None, :]
        s -= tl.abs(apart)
        side = tl.where(apart > 0, 1.0, tl.where(apart < 0, -1.0, 0.0))
    at = t + S - T
    seen = (n < S)[None, :] & (t < T)[:, None]
    if CAUSAL:
        seen = seen & (n[None, :] <= at[:, None])
    if WINDOW:
        seen = seen & (n[None, :] > at[:, None] - window)
    if document_q is not None:
        dq = tl.load(document_q + r * T + t, mask=t < T, other=0)
        dk = tl.load(document_k + r * S + n, mask=n < S, other=0)
        seen = seen & (dq[:, None] == dk[None, :]) & (dk != 0)[None, :]
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
def _key_range(
    first, bounds, r, i, T, S, window, BM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Keys that queries ``first`` .. ``first + BM`` may see."""
    low, high = 0, S
    if CAUSAL:
        high = tl.maximum(0, tl.minimum(S, first + BM + S - T))
    if WINDOW:
        low = tl.maximum(0, first + S - T - window + 1)
    if bounds is not None:
        at = bounds + (r * tl.cdiv(T, BM) + i) * 2
        low = tl.maximum(low, tl.load(at))
        high = tl.minimum(high, tl.load(at + 1))
    return low, high


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
    bounds,
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
    low, high = _key_range(i * BM, bounds, r, i, T, S, window, BM, CAUSAL, WINDOW)
    for c in range(low // BN * BN, high, BN):
        n = c + tl.arange(0, BN)
        kt = _load(k, r, n, h // M, S, G, K, BK)
        dots = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
        s, _, _ = _scores(
            dots, t, n, fade_q, fade_k, document_q, document_k, r, h, T, S, window, scale, softcap,
            H, CAUSAL, WINDOW, CAP,
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
    qt, kt, vt, dyt, ends, dots_y, t, n, fade_q, fade_k, document_q, document_k, r, h, T, S, window,
    scale, softcap, H: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the probabilities of a tile, the gradients of its scores, and the sign of its fade.

    The gradients are those before and after the soft-cap; the sign is what `_scores` says of
    the fade.
    """
    dots = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    s, slope, side = _scores(
        dots, t, n, fade_q, fade_k, document_q, document_k, r, h, T, S, window, scale, softcap,
        H, CAUSAL, WINDOW, CAP,
    )  # fmt: skip
    p = tl.exp2((s - ends[:, None]) * LOG2E)
    dp = tl.dot(dyt, tl.trans(vt), input_precision=PRECISION)
    capped = p * (dp - dots_y[:, None])
    return p, capped * slope if CAP else capped, capped, side


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
    bounds,
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
    low, high = _key_range(i * BM, bounds, r, i, T, S, window, BM, CAUSAL, WINDOW)
    for c in range(low // BN * BN, high, BN):
        n = c + tl.arange(0, BN)
        kt, vt = _load(k, r, n, h // M, S, G, K, BK), _load(v, r, n, h // M, S, G, V, BV)
        _, ds, capped, side = _dscores(
            qt, kt, vt, dyt, ends, dots_y, t, n, fade_q, fade_k, document_q, document_k, r, h, T, S,
            window, scale, softcap, H, CAUSAL, WINDOW, CAP, PRECISION,
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
    bounds,
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
    tiles = tl.cdiv(S, BN)
    j = tl.program_id(0) % tiles
    r = (tl.program_id(0) // tiles // G).to(tl.int64)
    g = tl.program_id(0) // tiles % G
    n = j * BN + tl.arange(0, BN)
    kt, vt = _load(k, r, n, g, S, G, K, BK), _load(v, r, n, g, S, G, V, BV)
    dkt, dvt = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BV), tl.float32)
    low, high = 0, T
    if CAUSAL:
        low = tl.maximum(0, j * BN - (S - T))
    if WINDOW:
        high = tl.maximum(0, tl.minimum(T, (j + 1) * BN - (S - T) + window))
    if bounds is not None:
        at = bounds + (r * tiles + j) * 2
        low = tl.maximum(low, tl.load(at))
        high = tl.minimum(high, tl.load(at + 1))
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
                qt, kt, vt, dyt, ends, dots_y, t, n, fade_q, fade_k, document_q, document_k, r, h,
                T, S, window, scale, softcap, H, CAUSAL, WINDOW, CAP, PRECISION,
            )  # fmt: skip
            dvt = tl.dot(tl.trans(p.to(dyt.dtype)), dyt, dvt, input_precision=PRECISION)
            if fade_q is not None:
                faded += tl.sum(capped * side, 0)
            dkt = tl.dot(tl.trans(ds.to(qt.dtype)), qt, dkt, input_precision=PRECISION)
        if fade_q is not None:
            tl.store(dfade_k + r * S * H + h + n * H, faded, mask=n < S)
    _store(dk, dkt * scale, r, n, g, S, G, K, BK)
    _store(dv, dvt, r, n, g, S, G, V, BV)


def _bounds(own: Tensor, other: Tensor, size: int, step: int) -> Tensor:
    """Return from where to where ``other`` holds documents of each tile of ``own``.

    `(R, tiles, 2)` int32, in steps. Documents come in any order; 0 is in none.
    """

    def ends(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        pad = -x.shape[1] % n
        tiles = torch.nn.functional.pad(x, (0, pad)).unflatten(1, (-1, n))
        most = torch.iinfo(x.dtype).max
        return tiles.masked_fill(tiles == 0, most).amin(-1), tiles.amax(-1)

    low, high = ends(own, size)
    first, last = ends(other, step)
    meet = (first[:, None] <= high[..., None]) & (last[:, None] >= low[..., None])
    steps = torch.arange(meet.shape[-1], device=own.device)
    begin = torch.where(meet, steps, meet.shape[-1]).amin(-1) * step
    end = torch.where(meet, steps + 1, 0).amax(-1).mul(step).clamp_max(other.shape[1])
    return torch.stack((begin, end), -1).int()


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
        self.sink = flat(score.sink_H, torch.float32)
        self.causal, self.window = mask.causal, mask.window or 0
        self.scale, self.softcap = score.factor(self.K), score.softcap or 0.0

    def launch(self, kernel: Any, way: str, *tensors: Tensor | None) -> None:
        BK, BV = (max(16, triton.next_power_of_2(n)) for n in (self.K, self.V))
        BM, BN, warps, stages = tile(max(BK, BV), self.q.element_size(), way)
        bounds, (queries, keys) = None, self.document
        if queries is not None and keys is not None:
            by_keys = way == "keys"
            bounds = _bounds(keys, queries, BN, BM) if by_keys else _bounds(queries, keys, BM, BN)
        own = (self.S, BN, self.G) if way == "keys" else (self.T, BM, self.H)
        kernel[(triton.cdiv(own[0], own[1]) * self.R * own[2],)](
            self.q,
            self.k,
            self.v,
            *tensors,
            *self.fade,
            *self.document,
            bounds,
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
            BM,
            BN,
            num_warps=warps,
            num_stages=stages,
        )


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec
) -> tuple[Tensor, Tensor]:
    """`mm.kernels.attention.blocks.forward`; no allowed, bias, relative or prefix."""
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
    delta = (dy.float() * y.float()).sum(-1).transpose(1, 2).contiguous()
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
