"""Softmax attention over rows: the reference, and the implementations that equal it.

A row holds ONE document, or several that ``allowed`` separates; mixers put each document into its
own row
(`mm.model.rows`), because a masked place still meets its neighbours as ``0 * value``, which is NaN
when the value is inf.

R rows, T queries, S keys, H query heads, G key heads (G divides H), K key width, V value width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.op import Op


def _allowed(
    allowed: Tensor | None, causal: bool, T: int, S: int, device: torch.device
) -> Tensor | None:
    """`(R or 1, T, S)` bool of both conditions, or None when everything is allowed."""
    if not causal:
        return allowed
    triangle = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None]
    return triangle if allowed is None else allowed & triangle


@Op
def attention(
    q_RTHK: Tensor,
    k_RSGK: Tensor,
    v_RSGV: Tensor,
    allowed_RTS: Tensor | None = None,
    *,
    causal: bool = False,
    bias_RHTS: Tensor | None = None,
    gain_RHTS: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Attend within rows; a query that may see nothing gets zeros.

    Args:
        q_RTHK: `(R, T, H, K)` queries, any float dtype; scores and softmax are float32 or wider.
        k_RSGK: `(R, S, G, K)` keys; query head h reads key head ``h // (H // G)``.
        v_RSGV: `(R, S, G, V)` values.
        allowed_RTS: `(R, T, S)` bool, True where the query may see the key; None = everywhere.
        causal: query t sees keys up to ``S - T + t`` (the last query sees all), besides
            ``allowed``.
        bias_RHTS: broadcasts to `(R, H, T, S)`, added to the logits.
        gain_RHTS: broadcasts to `(R, H, T, S)`, multiplied after the softmax (URPE).
        scale: of the logits; default ``K ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before ``bias`` is added.
        sink_H: `(H,)` logit of a key that every query sees and whose value is zero.
    Returns:
        `(R, T, H, V)` in the dtype of the values.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; grouped heads: Ainslie et al. 2023
    (arXiv:2305.13245); soft-cap: Gemma 2 (arXiv:2408.00118), section 2; sink: gpt-oss
    (arXiv:2508.10925), section 2.
    """
    R, T, H, K = q_RTHK.shape
    S, G = k_RSGK.shape[1], k_RSGK.shape[2]
    wide = torch.promote_types(v_RSGV.dtype, torch.float32)
    with torch.autocast(q_RTHK.device.type, enabled=False):
        q = q_RTHK.to(wide).reshape(R, T, G, H // G, K)
        logits = torch.einsum("rtghk,rsgk->rghts", q, k_RSGK.to(wide)) * (scale or 1 / math.sqrt(K))
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        if bias_RHTS is not None:
            logits = logits + bias_RHTS.to(wide).expand(R, H, T, S).reshape(logits.shape)
        seen = _allowed(allowed_RTS, causal, T, S, q.device)
        hidden = ~seen[:, None, None] if seen is not None else None
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        if sink_H is not None:
            column = sink_H.to(wide).view(G, H // G, 1, 1).expand(*logits.shape[:-1], 1)
            p = torch.cat((logits, column), -1).softmax(-1)[..., :-1]
        else:
            p = logits.softmax(-1)
        if hidden is not None:
            # Filled twice: a query without keys has a NaN softmax, which must become zeros, not
            # NaN.
            p = p.masked_fill(hidden, 0)
        if gain_RHTS is not None:
            p = p * gain_RHTS.to(wide).expand(R, H, T, S).reshape(p.shape)
        y = torch.einsum("rghts,rsgv->rtghv", p, v_RSGV.to(wide))
        return y.reshape(R, T, H, v_RSGV.shape[-1]).to(v_RSGV.dtype)


def _sdpa_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    *,
    causal: bool = False,
    bias_RHTS: Tensor | None = None,
    gain_RHTS: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> str | None:
    if gain_RHTS is not None:
        return "it has no gain after the softmax"
    if softcap is not None:
        return "it has no soft-cap"
    if bias_RHTS is not None:
        return "it rounds the bias to the dtype of the queries"
    if sink_H is not None and q.device.type != "cpu":
        return "it rounds the sink to the dtype of the queries"
    if causal and sink_H is None and q.shape[1] != k.shape[1]:
        return "its causal mask is aligned to the first key, not the last"
    if q.shape[1] == 0 or q.shape[0] == 0:
        return "no queries"
    return None


@attention.register("sdpa", _sdpa_why_not)
def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    *,
    causal: bool = False,
    bias_RHTS: Tensor | None = None,
    gain_RHTS: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    dtype = v.dtype
    if q.device.type == "cpu":
        # bf16 SDPA on a CPU is 4 times slower than fp32 at a few hundred tokens, and rounds the
        # probabilities.
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    if sink_H is not None:
        seen = _allowed(allowed, causal, q.shape[1], k.shape[1], q.device)
        return _sunk(q, k, v, seen, sink_H, scale or 1 / math.sqrt(q.shape[-1])).to(dtype)
    seen = (
        _allowed(allowed, causal, q.shape[1], k.shape[1], q.device) if allowed is not None else None
    )
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if seen is None else seen[:, None],
            is_causal=causal and seen is None,
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        ).transpose(1, 2)
    if seen is not None:  # a query without keys: backends differ (NaN or zeros)
        y = y.masked_fill(~seen.any(-1)[:, :, None, None], 0)
    return y.to(dtype)


def _sunk(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, sink_H: Tensor, scale: float
) -> Tensor:
    """A sink as one more key of value zero: one more column makes its logit, and nobody else's."""
    T, S, K, V = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    width = max(K + 1, V)  # equal widths: unequal ones have no fused kernel on a CPU
    column = (sink_H.to(q.dtype) / scale)[:, None].expand(*q.shape[:-1], 1)
    q = F.pad(torch.cat((q, column), -1), (0, width - K - 1))
    key = F.one_hot(torch.tensor(K, device=k.device), width).to(k.dtype)
    k = torch.cat((key.expand(k.shape[0], 1, k.shape[2], width), F.pad(k, (0, width - K))), 1)
    v = F.pad(v, (0, width - V, 0, 0, 1, 0))
    if seen is None:
        seen = torch.ones(1, T, S, dtype=torch.bool, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=F.pad(seen, (1, 0), value=True)[:, None],
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
    return y.transpose(1, 2)[..., :V]
