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
    Returns:
        `(R, T, H, V)` in the dtype of the values.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; grouped heads: Ainslie et al. 2023
    (arXiv:2305.13245).
    """
    R, T, H, K = q_RTHK.shape
    S, G = k_RSGK.shape[1], k_RSGK.shape[2]
    wide = torch.promote_types(v_RSGV.dtype, torch.float32)
    with torch.autocast(q_RTHK.device.type, enabled=False):
        q = q_RTHK.to(wide).reshape(R, T, G, H // G, K)
        logits = torch.einsum("rtghk,rsgk->rghts", q, k_RSGK.to(wide)) * (scale or 1 / math.sqrt(K))
        if bias_RHTS is not None:
            logits = logits + bias_RHTS.to(wide).expand(R, H, T, S).reshape(logits.shape)
        seen = _allowed(allowed_RTS, causal, T, S, q.device)
        if seen is None:
            p = logits.softmax(-1)
        else:
            hidden = ~seen[:, None, None]
            # Filled twice: a query without keys has a NaN softmax, which must become zeros, not
            # NaN.
            p = logits.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)
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
) -> str | None:
    if gain_RHTS is not None:
        return "it has no gain after the softmax"
    if bias_RHTS is not None:
        return "it rounds the bias to the dtype of the queries"
    if causal and q.shape[1] != k.shape[1]:
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
) -> Tensor:
    dtype = v.dtype
    if q.device.type == "cpu":
        # bf16 SDPA on a CPU is 4 times slower than fp32 at a few hundred tokens, and rounds the
        # probabilities.
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
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
