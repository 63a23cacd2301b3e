"""Attention with negative weights. B rows, T tokens, D model, H heads, G key heads, K head width, R
rows of one document, S keys.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Out
from mm.model.linears.dense import dense
from mm.model.mixers.attention.base import GroupedAttention, HeadsConfig
from mm.model.mixers.attention.kv_cache import KV, DraftKV
from mm.registry import MIXERS
from mm.state import State

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

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        assert state is None or isinstance(state, KV | DraftKV)
        cache = state.commit() if state is not None else None
        y, after = self.attended(*self.projected(x_BTD, ctx), ctx, cache)
        return Out(self.out(y.flatten(2), ctx), after)

    def attend(
        self,
        q_RTHK: Tensor,
        k_RSGK: Tensor,
        v_RSGV: Tensor,
        allowed_RTS: Tensor | None,
        causal: bool,
        bias_RHTS: Tensor | None,
        cached: bool,
    ) -> Tensor:
        (R, T, H, K), (S, G) = q_RTHK.shape, k_RSGK.shape[1:3]
        wide = torch.promote_types(v_RSGV.dtype, torch.float32)
        outs = []
        with torch.autocast(q_RTHK.device.type, enabled=False):
            q = q_RTHK.to(wide).view(R, T, G, H // G, K) * K**-0.5
            k, v = k_RSGK.to(wide), v_RSGV.to(wide)
            if bias_RHTS is not None:
                bias_RHTS = bias_RHTS.to(wide).expand(R, H, T, S).unflatten(1, (G, H // G))
            for at, part in zip(range(0, max(T, 1), BLOCK), q.split(BLOCK, dim=1), strict=True):
                stop = at + part.shape[1]
                seen = S - T + stop if causal else S
                logits = torch.einsum("rtghk,rsgk->rghts", part, k[:, :seen])
                if bias_RHTS is not None:
                    logits = logits + bias_RHTS[..., at:stop, :seen]
                hidden = None
                if allowed_RTS is not None:
                    hidden = ~allowed_RTS[:, None, None, at:stop, :seen]
                if causal:
                    late = torch.ones(stop - at, seen, dtype=torch.bool, device=q.device)
                    late = late.triu(S - T + at + 1)
                    hidden = late if hidden is None else hidden | late
                weights = signed_softmax(logits, hidden)
                outs.append(torch.einsum("rghts,rsgv->rtghv", weights, v[:, :seen]))
        return torch.cat(outs, dim=1).reshape(R, T, H, v.shape[-1]).to(v_RSGV.dtype)


@MIXERS.register("cog_attention")
class CogAttentionConfig(HeadsConfig):
    """Attention with negative weights (Cog)."""

    kind: Literal["cog_attention"] = "cog_attention"
    qk_norm: bool = False

    def build(self, d_model: int, linear: LinearFactory = dense) -> CogAttention:
        heads, kv_heads, head_dim = self.sizes(d_model)
        return CogAttention(
            d_model,
            heads,
            kv_heads,
            head_dim,
            self.placed(head_dim, d_model),
            linear,
            self.qk_norm,
        )

    @classmethod
    def smallest(cls) -> CogAttentionConfig:
        return cls(heads=2, kv_heads=1)
