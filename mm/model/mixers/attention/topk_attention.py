"""Attention to the k best keys of each query.

R rows of one document, L tokens, S keys, H heads, G key heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.model.layer import LinearFactory
from mm.model.mixers.attention.indexed import IndexedAttention, IndexedConfig, read_all
from mm.registry import MIXERS

SCORES = 1 << 22  # elements of scores in hand at once


def to_nearest_neighbours(
    q: Tensor, k: Tensor, longest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys `(..., S, K + 2)` of unit length whose distances order as inner products do.

    ``longest``: largest length of a key, `(..., 1, 1)`; default over the given ones. Nearest
    neighbours of those are the keys of largest inner product, so that any index for
    neighbours finds them.

    Source: Mao et al. 2024 (IceFormer, ICLR 2024), section 4.
    """
    longest = k.norm(dim=-1, keepdim=True).amax(-2, keepdim=True) if longest is None else longest
    k = k / longest
    rest = (1 - k.square().sum(-1, keepdim=True)).clamp_min(0).sqrt()
    none = torch.zeros_like(q[..., :1])
    q = q / q.norm(dim=-1, keepdim=True)
    return torch.cat((q, none, none), -1), torch.cat((k, rest, torch.zeros_like(rest)), -1)


class TopKAttention(IndexedAttention):
    """Softmax over the ``topk`` keys of largest score.

    The weights are those of `attention`, so a trained model needs no retraining. The search is
    exact and blockwise (scores of a few queries at a time, none kept): memory is ``L * topk``.

    Source: Mao et al. 2024, IceFormer (ICLR 2024), section 4, with exact search for its index;
    with training: Gupta et al. 2021 (arXiv:2106.06899).
    """

    caps = replace(IndexedAttention.caps, shard="ulysses")

    def __init__(self, d_model: int, config: TopKAttentionConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        self.topk = config.topk

    def read(
        self, q_RLHK: Tensor, k_RSGK: Tensor, v_RSGK: Tensor, at_RL: Tensor, of_RS: Tensor
    ) -> Tensor:
        (R, L, H, K), (S, G) = q_RLHK.shape, k_RSGK.shape[1:3]
        wide = torch.promote_types(v_RSGK.dtype, torch.float32)
        at_RL, of_RS = at_RL.expand(R, L), of_RS.expand(R, S)
        q = (q_RLHK.to(wide) * K**-0.5).view(R, L, G, H // G, K)
        k, v = k_RSGK.to(wide).movedim(2, 1), v_RSGK.to(wide).movedim(2, 1)  # (R, G, S, K)
        size = max(1, SCORES // max(1, R * H * S))
        done = []
        with torch.autocast(q.device.type, enabled=False):
            for part, at in zip(q.split(size, 1), at_RL.split(size, 1), strict=True):
                part = part.permute(0, 2, 3, 1, 4)  # (R, G, H / G, l, K)
                seen = read_all(at, of_RS)[:, None, None]
                with torch.no_grad():
                    scores = part @ k[:, :, None].transpose(-1, -2)
                    scores = scores.masked_fill(~seen, -math.inf)
                    found = scores.topk(min(self.topk, S), dim=-1)
                index = found.indices.flatten(2, 4)  # (R, G, H / G l k)
                take = lambda t, index=index, shape=found.indices.shape: t.gather(
                    2, index[..., None].expand(-1, -1, -1, K)
                ).view(*shape, K)
                logits = (part[..., None, :] * take(k)).sum(-1)
                p = logits.masked_fill(found.values == -math.inf, -math.inf).softmax(-1)
                done.append((p[..., None] * take(v)).sum(-2).permute(0, 3, 1, 2, 4))
        return torch.cat(done, dim=1).reshape(R, L, H, K).to(v_RSGK.dtype)


@MIXERS.register("topk_attention")
class TopKAttentionConfig(IndexedConfig):
    """Attention to the best keys only."""

    kind: Literal["topk_attention"] = "topk_attention"
    topk: Annotated[int, Field(gt=0)] = 64

    layer = TopKAttention
    small = {"heads": 2, "kv_heads": 1, "topk": 3}
