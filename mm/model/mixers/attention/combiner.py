"""Attention as a structured expectation.

R rows of one document, L tokens, S keys, H heads, K head width, n regions of c tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from mm.model.layer import LinearFactory
from mm.model.mixers.attention.indexed import IndexedAttention, IndexedConfig, read_all
from mm.registry import MIXERS


class Combiner(IndexedAttention):
    """``p(j | i)`` of tokens in the own region; ``p(region | i) p(j | region)`` of earlier ones.

    With pooled queries and keys ``q_r, k_r`` of region r, ``p(j | i) ~ exp(q_i k_j)``, ``p(r | i) ~
    exp(q_i k_r)`` under one normaliser, and ``p(j | r) = softmax_j(q_r k_j)``, which no reader
    moves. Every earlier token is read with some weight, by ``L * (c + L / c)`` scores. The cache
    keeps queries beside keys: a region is pooled when it is full.

    Source: Ren et al. 2021 (arXiv:2107.05768), Combiner-Fixed, causal.
    """

    caps = replace(IndexedAttention.caps, shard="ulysses")

    keeps_queries = True

    def __init__(self, d_model: int, config: CombinerConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        self.region, self.pool = config.region, config.pool

    def summaries(self, kq: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(R, n, H, K)` of full regions.

        Args:
            kq: `(R, n, c, H, 2 K)` keys with queries, float32 or wider.
            v: `(R, n, c, H, K)`.
        """
        k, q = kq.chunk(2, dim=-1)
        pool = (lambda t: t.amax(2)) if self.pool == "max" else (lambda t: t.mean(2))
        local = torch.einsum("rnhk,rnchk->rnch", pool(q), k) * self.head_dim**-0.5
        return pool(k), torch.einsum("rnch,rnchk->rnhk", local.softmax(2), v)

    def rows(self, q_RLHK: Tensor, k_RLGK: Tensor, v_RLGK: Tensor) -> Tensor:
        (R, L, H, K), c = q_RLHK.shape, self.region
        n = -(-L // c)
        wide = torch.promote_types(v_RLGK.dtype, torch.float32)
        # Padding fills the last region only, which no other region reads.
        q, kq, v = (
            F.pad(t.to(wide), (0, 0, 0, 0, 0, n * c - L)).unflatten(1, (n, c))
            for t in (q_RLHK, k_RLGK, v_RLGK)
        )
        with torch.autocast(q.device.type, enabled=False):
            q = q * K**-0.5
            inner, regions = torch.arange(c, device=q.device), torch.arange(n, device=q.device)
            near = torch.einsum("rnqhk,rnshk->rnhqs", q, kq[..., :K])
            near = near.masked_fill(inner[:, None] < inner, -math.inf)
            key, value = self.summaries(kq, v)
            far = torch.einsum("rnqhk,rmhk->rnhqm", q, key)
            later = (regions[:, None] <= regions)[None, :, None, None]
            p = torch.cat((near, far.masked_fill(later, -math.inf)), dim=-1).softmax(-1)
            y = torch.einsum("rnhqs,rnshk->rnqhk", p[..., :c], v)
            y = y + torch.einsum("rnhqm,rmhk->rnqhk", p[..., c:], value)
        return y.reshape(R, n * c, H, K)[:, :L].to(v_RLGK.dtype)

    def read(
        self, q_RLHK: Tensor, k_RSGK: Tensor, v_RSGK: Tensor, at_RL: Tensor, of_RS: Tensor
    ) -> Tensor:
        (R, S, H, _), K, c = k_RSGK.shape, self.head_dim, self.region
        wide = torch.promote_types(v_RSGK.dtype, torch.float32)
        n = -(-S // c)
        with torch.autocast(q_RLHK.device.type, enabled=False):
            # Token p goes to (p // c, p % c), whatever order it came in; what holds nothing, past
            # the end.
            to = torch.where(of_RS >= 0, of_RS, n * c).expand(R, S)
            q = q_RLHK.to(wide) * K**-0.5
            sorted_ = [
                t.new_zeros(R, n * c + 1, H, t.shape[-1], dtype=wide).scatter(
                    1, to[..., None, None].expand(t.shape), t.to(wide)
                )[:, :-1]
                for t in (k_RSGK, v_RSGK)
            ]
            kq, v = sorted_
            at = torch.arange(n * c, device=q.device)[None]
            near = torch.einsum("rlhk,rshk->rhls", q, kq[..., :K])
            seen = read_all(at_RL, at) & (at_RL[:, :, None] // c == at[:, None] // c)
            key, value = self.summaries(kq.unflatten(1, (n, c)), v.unflatten(1, (n, c)))
            far = torch.einsum("rlhk,rmhk->rhlm", q, key)
            later = at_RL[:, :, None] // c <= torch.arange(n, device=q.device)
            p = torch.cat(
                (
                    near.masked_fill(~seen[:, None], -math.inf),
                    far.masked_fill(later[:, None], -math.inf),
                ),
                dim=-1,
            ).softmax(-1)
            y = torch.einsum("rhls,rshk->rlhk", p[..., : n * c], v)
            y = y + torch.einsum("rhlm,rmhk->rlhk", p[..., n * c :], value)
        return y.to(v_RSGK.dtype)


@MIXERS.register("combiner")
class CombinerConfig(IndexedConfig):
    """Combiner with fixed regions."""

    kind: Literal["combiner"] = "combiner"
    region: Annotated[int, Field(gt=0, description="tokens; about the root of the length")] = 64
    pool: Annotated[Literal["max", "mean"], Field(description="a region's query and key")] = "max"

    layer = Combiner

    @model_validator(mode="after")
    def _fits(self) -> CombinerConfig:
        if self.kv_heads not in (None, self.heads):
            raise ValueError("combiner pools queries with keys: kv_heads must equal heads")
        return self

    small = {"heads": 2, "region": 3}
