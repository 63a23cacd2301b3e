"""Attention whose positions are accumulated Householder products.

R rows, T queries, P cached keys, S = P + T keys, H query heads, G key heads (G divides H), K key
width, V value width; in the block form n blocks of C tokens, E = H / G query heads a key head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.attention.spec import NO_MASK, PLAIN_SCORE, MaskSpec, ScoreSpec
from mm.kernels.op import Op

BLOCK = 64  # tokens


@Op
def path_attention(
    q_RTHK: Tensor,
    k_RSGK: Tensor,
    v_RSGV: Tensor,
    w_RTGK: Tensor,
    beta_RTG: Tensor,
    mask: MaskSpec = NO_MASK,
    score: ScoreSpec = PLAIN_SCORE,
) -> Tensor:
    """Causal softmax attention with logits ``scale k_j^T (H_{j+1} ...

    H_i) q_i + c_i - c_j``, ``H_t = I - beta_t w_t w_t^T``: as a decoder computes it, by moving
    the keys.

    Args:
        q_RTHK: `(R, T, H, K)` queries, any float dtype; accumulated in float32 or wider; query head
            h reads key head ``h // (H // G)``.
        k_RSGK: `(R, P + T, G, K)` keys: P cached ones, moved up to the token before the call, and
            the call's own.
        v_RSGV: `(R, P + T, G, V)` values.
        w_RTGK: `(R, T, G, K)` directions of the call's tokens, at most of length 1.
        beta_RTG: `(R, T, G)` strengths in [0, 2]; a token with beta = 0 moves nothing.
        mask: ``allowed_RTS`` besides causality, nothing else. A query that may see nothing gets
            zeros.
        score: ``scale``, and ``fade_RTH`` and ``fade_RSH``, the sums c of the log forget gates up
            to each query and each key, float32 or wider; nothing else.
    Returns:
        `(R, T, H, V)` in the dtype of the values.
    Source: Yang et al. 2025, PaTH Attention (arXiv:2505.16381), section 3; gates: there, PaTH-FoX,
    after Lin et al. 2025 (arXiv:2503.02130), eq. 5-8.
    """
    _refuse(mask, score)
    (R, T, H, K), G = q_RTHK.shape, k_RSGK.shape[2]
    P = k_RSGK.shape[1] - T
    wide = torch.promote_types(v_RSGV.dtype, torch.float32)
    factor: float = K**-0.5 if score.scale is None else score.scale
    allowed_RTS, fade_RTH, fade_RSH = mask.allowed_RTS, score.fade_RTH, score.fade_RSH
    q = q_RTHK.to(wide).reshape(R, T, G, H // G, K)
    past, *own = k_RSGK.to(wide).split((P, *[1] * T), dim=1)
    keys, outs, v = past, [], v_RSGV.to(wide)
    turns = zip(w_RTGK.to(wide).unbind(1), beta_RTG.to(wide).unbind(1), strict=True)
    steps = zip(q.unbind(1), own, turns, strict=True)
    for t, (q_t, k_t, (w, beta)) in enumerate(steps):
        read = torch.einsum("rsgk,rgk->rsg", keys, w) * beta[:, None]
        keys = torch.cat((keys - read[..., None] * w[:, None], k_t), dim=1)
        logits = factor * torch.einsum("rgek,rsgk->rges", q_t, keys)
        if fade_RTH is not None and fade_RSH is not None:
            faded = (fade_RTH[:, t, None] - fade_RSH[:, : P + t + 1]).transpose(1, 2)
            logits = logits + faded.unflatten(1, (G, H // G)).to(wide)
        hidden = None
        if allowed_RTS is not None:
            hidden = ~allowed_RTS[:, t, : P + t + 1][:, None, None]
        outs.append(torch.einsum("rges,rsgv->rgev", _softmax(logits, hidden), v[:, : P + t + 1]))
    y = torch.stack(outs, 1) if outs else v.new_zeros(R, 0, H, v.shape[-1])
    return y.reshape(R, T, H, v.shape[-1]).to(v_RSGV.dtype)


def _refuse(mask: MaskSpec, score: ScoreSpec) -> None:
    rest = score._replace(scale=None, fade_RTH=None, fade_RSH=None)
    if mask._replace(allowed_RTS=None).is_set() or any(x is not None for x in rest):
        raise ValueError("path_attention takes allowed, scale and fade of its specs, nothing else")


@Op
def move_keys(k_RSGK: Tensor, w_RTGK: Tensor, beta_RTG: Tensor) -> Tensor:
    """Return the keys as the token after the call meets them.

    Each passes ``H_t`` of every later token of the call.

    Args:
        k_RSGK: `(R, P + T, G, K)` P cached keys and the call's own, any float dtype; accumulated in
            float32 or wider.
        w_RTGK, beta_RTG: as in `path_attention`.
    Returns:
        `(R, P + T, G, K)` float32 or wider.
    Source: Yang et al. 2025 (arXiv:2505.16381), section 3.3.
    """
    T = w_RTGK.shape[1]
    wide = torch.promote_types(k_RSGK.dtype, torch.float32)
    keys, *own = k_RSGK.to(wide).split((k_RSGK.shape[1] - T, *[1] * T), dim=1)
    for k, w, beta in zip(own, w_RTGK.to(wide).unbind(1), beta_RTG.to(wide).unbind(1), strict=True):
        read = torch.einsum("rsgk,rgk->rsg", keys, w) * beta[:, None]
        keys = torch.cat((keys - read[..., None] * w[:, None], k), dim=1)
    return keys


def _softmax(logits: Tensor, hidden: Tensor | None) -> Tensor:
    if hidden is None:
        return logits.softmax(-1)
    # Filled twice: a query without keys has a NaN softmax, which must become zeros.
    return logits.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)


def _blocks(x: Tensor, n: int, C: int, wide: torch.dtype) -> Tensor:
    """`(R, T, G, ...)` to `(n, R, G, C, ...)`; padding is zero."""
    pad = n * C - x.shape[1]
    x = F.pad(x.to(wide), (0, 0) * (x.dim() - 2) + (0, pad)) if pad else x.to(wide)
    return x.unflatten(1, (n, C)).movedim((1, 0, 3), (0, 1, 2))


def _triangle(w: Tensor, beta: Tensor) -> Tensor:
    """``(I + tril(diag(beta) W W^T, -1))^{-1} diag(beta)`` of directions `(..., C, K)`."""
    system = (beta * (w @ w.mT)).tril(-1)
    return torch.linalg.solve_triangular(
        system, torch.diag_embed(beta[..., 0]), upper=False, unitriangular=True
    )


def _why_not(q: Tensor, *_: Any, **__: Any) -> str | None:
    return "no queries" if q.shape[1] == 0 or q.shape[0] == 0 else None


@path_attention.register("blocks", _why_not)
def _by_blocks(
    q_RTHK: Tensor,
    k_RSGK: Tensor,
    v_RSGV: Tensor,
    w_RTGK: Tensor,
    beta_RTG: Tensor,
    mask: MaskSpec = NO_MASK,
    score: ScoreSpec = PLAIN_SCORE,
) -> Tensor:
    """The UT form: within a block ``H_{j+1} ...

    H_i = I - W^T M^T W`` over its tokens, with ``M = (I + tril(diag(beta) W W^T, -1))^{-1}
    diag(beta)``; from block to block, later queries pass the whole product, so all is matmuls
    and no product is ever stored for a pair of tokens.

    Source: Yang et al. 2025 (arXiv:2505.16381), section 3.2 and algorithm 1.
    """
    _refuse(mask, score)
    allowed_RTS, fade_RTH, fade_RSH = mask.allowed_RTS, score.fade_RTH, score.fade_RSH
    (R, T, H, K), G, V = q_RTHK.shape, k_RSGK.shape[2], v_RSGV.shape[-1]
    P, E = k_RSGK.shape[1] - T, H // G
    wide = torch.promote_types(v_RSGV.dtype, torch.float32)
    factor: float = K**-0.5 if score.scale is None else score.scale
    n = -(-T // BLOCK)
    C = -(-T // n)
    with torch.autocast(q_RTHK.device.type, enabled=False):
        q = _blocks(q_RTHK.reshape(R, T, G, E * K), n, C, wide).unflatten(-1, (E, K))
        q = q.movedim(-2, 3)  # (n, R, G, E, C, K)
        own_k, past = k_RSGK[:, P:], k_RSGK[:, :P].to(wide).transpose(1, 2)  # (R, G, P, K)
        k, w = _blocks(own_k, n, C, wide), _blocks(w_RTGK, n, C, wide)
        beta = _blocks(beta_RTG[..., None], n, C, wide)
        # What the products do to keys and queries inside their block.
        M = _triangle(w, beta)
        wk = M @ (w @ k.mT).tril(-1)  # (n, R, G, C, C): M times products of w_a and k_j, a > j
        qw = (q @ w.mT[:, :, :, None]).tril()  # (n, R, G, E, C, C)
        inside = (q @ k.mT[:, :, :, None]).tril() - qw @ wk[:, :, :, None]
        mw = M @ w
        at_start = q - qw @ mw[:, :, :, None]  # queries moved back to the start of their block
        at_end = k - wk.mT @ w  # keys moved to the end of their block
        logits: list[list[Tensor]] = [[] for _ in range(n)]
        later = q.new_empty(0)  # (R, G, E, rows, K) queries of later blocks, once there are some
        unroll = lambda x: x.unbind(0)
        for j, (a, start, end, w_j, mw_j) in reversed(
            list(enumerate(zip(*map(unroll, (inside, at_start, at_end, w, mw)), strict=True)))
        ):
            logits[j].insert(0, a)
            if j == n - 1:
                later = start
                continue
            across = later @ end.mT[:, :, None]
            for i, part in enumerate(across.split(C, dim=-2), j + 1):
                logits[i].insert(0, part)
            moved = later - (later @ w_j.mT[:, :, None]) @ mw_j[:, :, None]
            later = torch.cat((start, moved), dim=-2)
        if P:
            for i, part in enumerate((later @ past.mT[:, :, None]).split(C, dim=-2)):
                logits[i].insert(0, part)
        v = v_RSGV.to(wide).transpose(1, 2)[:, :, None]  # (R, G, 1, S, V)
        by_head = lambda x: x.transpose(1, 2).unflatten(1, (G, E))  # (R, G, E, T or S)
        outs = []
        for i, parts in enumerate(logits):
            at, stop = i * C, min((i + 1) * C, T)
            rows, seen = stop - at, P + stop
            hidden = torch.ones(rows, seen, dtype=torch.bool, device=q.device).triu(P + at + 1)
            if allowed_RTS is not None:
                hidden = hidden | ~allowed_RTS[:, None, None, at:stop, :seen]
            scores = factor * torch.cat(parts, -1)[..., :rows, :seen]
            if fade_RTH is not None and fade_RSH is not None:
                ours, theirs = by_head(fade_RTH[:, at:stop]), by_head(fade_RSH[:, :seen])
                scores = scores + (ours[..., None] - theirs[..., None, :]).to(wide)
            outs.append(_softmax(scores, hidden) @ v[..., :seen, :])
        return torch.cat(outs, -2).movedim(3, 1).reshape(R, T, H, V).to(v_RSGV.dtype)


@move_keys.register("blocks", lambda k, w, beta: _why_not(w))
def _moved_by_blocks(k_RSGK: Tensor, w_RTGK: Tensor, beta_RTG: Tensor) -> Tensor:
    T = w_RTGK.shape[1]
    P = k_RSGK.shape[1] - T
    wide = torch.promote_types(k_RSGK.dtype, torch.float32)
    n = -(-T // BLOCK)
    C = -(-T // n)
    with torch.autocast(k_RSGK.device.type, enabled=False):
        keys = k_RSGK[:, :P].to(wide).transpose(1, 2)  # (R, G, P, K)
        k, w = _blocks(k_RSGK[:, P:], n, C, wide), _blocks(w_RTGK, n, C, wide)
        M = _triangle(w, _blocks(beta_RTG[..., None], n, C, wide))
        at_end = k - (M @ (w @ k.mT).tril(-1)).mT @ w
        for w_j, mw_j, end in zip(w.unbind(0), (M @ w).unbind(0), at_end.unbind(0), strict=True):
            keys = torch.cat((keys - (keys @ mw_j.mT) @ w_j, end), dim=2)
        return keys[:, :, : P + T].transpose(1, 2)
