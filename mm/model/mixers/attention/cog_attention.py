"""Attention with negative weights.

R rows of one document, T queries, S keys, H heads, G key heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mm.model.mixers.attention.base import AttentionRows, GroupedAttention, HeadsConfig
from mm.registry import MIXERS

BLOCK = 256  # queries whose scores exist at a time; causal ones meet no later keys


def signed_softmax(logits: Tensor, hidden: Tensor | None) -> Tensor:
    """``sign(s) exp(|s| - m) / sum exp(|s| - m)`` over the last dimension, m = max |s|.

    Args:
        logits: `(..., S)` float32 or wider.
        hidden: broadcasts to ``logits``, True where the weight is zero; a row without anything to
            see is zeros.
    Source: Lv et al. 2024, More Expressive Attention with Negative Weights (arXiv:2411.07176),
    section 3.
    """
    size = logits.abs()
    if hidden is not None:
        size = size.masked_fill(hidden, -math.inf)
    p = size.softmax(-1) * logits.detach().sign()
    # Filled: a row that sees nothing has a NaN softmax.
    return p.masked_fill(hidden, 0) if hidden is not None else p


class CogAttention(GroupedAttention):
    """Attention whose weights have the sign of their logit and absolute sum 1 a row.

    Source: Lv et al. 2024 (arXiv:2411.07176), section 3; its models keep softmax in the first and
    the last layer, which a pattern says.
    """

    caps = replace(GroupedAttention.caps, shard="ulysses")

    def attend(self, rows: AttentionRows) -> Tensor:
        mask, score = rows.mask, rows.score
        (R, T, H, K), (S, G) = rows.q.shape, rows.k.shape[1:3]
        wide = torch.promote_types(rows.v.dtype, torch.float32)
        outs = []
        with torch.autocast(rows.q.device.type, enabled=False):
            q = rows.q.to(wide).view(R, T, G, H // G, K) * K**-0.5
            k, v = rows.k.to(wide), rows.v.to(wide)
            bias, allowed = score.total_bias(), mask.dense(T, S, q.device)
            if bias is not None:
                bias = bias.to(wide).expand(R, H, T, S).unflatten(1, (G, H // G))
            causal = mask.causal and mask.prefix_RT is None
            for at, part in zip(range(0, max(T, 1), BLOCK), q.split(BLOCK, dim=1), strict=True):
                stop = at + part.shape[1]
                seen = S - T + stop if causal else S
                logits = torch.einsum("rtghk,rsgk->rghts", part, k[:, :seen])
                if bias is not None:
                    logits = logits + bias[..., at:stop, :seen]
                hidden = None
                if allowed is not None:
                    hidden = ~allowed[:, None, None, at:stop, :seen]
                weights = signed_softmax(logits, hidden)
                outs.append(torch.einsum("rghts,rsgv->rtghv", weights, v[:, :seen]))
        return torch.cat(outs, dim=1).reshape(R, T, H, v.shape[-1]).to(rows.v.dtype)


@MIXERS.register("cog_attention")
class CogAttentionConfig(HeadsConfig):
    """Attention with negative weights (Cog)."""

    kind: Literal["cog_attention"] = "cog_attention"
    qk_norm: bool = False

    layer = CogAttention
