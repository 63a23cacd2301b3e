"""Multi-head latent attention.

B rows, T tokens, D model, H heads, C latent width, K width of a head without positions, P width of
its rotated part, V value width, R rows of one document, S keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.attention import attention
from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.layer_config import LayerConfig
from mm.model.mixers.attention.base import AttentionBase, AttentionRows, head_dim_of
from mm.model.mixers.attention.kv_cache import KeyValueCache
from mm.model.norm import RMSNorm
from mm.model.positions.irpe import IRPE
from mm.registry import MIXERS, PositionField
from mm.state import State


class LatentAttention(AttentionBase):
    """Attention whose keys and values are raised from one latent a token.

    The cache holds that latent and one rotated key for all heads.

    While there is a State the raising matrices act on queries and outputs instead, so that the
    latent itself is attended to: nothing is raised again for every cached token.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2, eq. 9-13 (latents), 2.1.3, eq. 14-19
    (decoupled rotary positions); absorbed form: there, after eq. 11. The latents pass RMS norms as
    in its appendix on hyper-parameters.
    """

    caps = replace(AttentionBase.caps, shard="ulysses")

    def __init__(self, d_model: int, config: LatentAttentionConfig, linear: LinearFactory):
        heads, K = config.heads, head_dim_of(d_model, config.heads, config.head_dim)
        P, V = config.rotary_dim or max(K // 2, 2), config.value_dim or K
        latent, query_latent = config.latent or 4 * K, config.query_latent
        position = config.position.build(P, heads=heads, d_model=d_model)
        if isinstance(position, IRPE):
            raise ValueError(
                "latent_attention: position 'irpe' reads whole queries, and these have a rotary "
                "part and another: use rope, alibi, t5_bias or none"
            )
        super().__init__(position)
        self.cache = KeyValueCache(1, latent + P, 0)
        self.heads, self.widths, self.latent = heads, (K, P, V), latent
        self.scale = (K + P) ** -0.5
        self.q_down = linear(d_model, query_latent, "q_down") if query_latent else None
        self.q_norm = RMSNorm(query_latent) if query_latent else None
        self.q = linear(query_latent or d_model, heads * (K + P), "q")
        self.kv_down = linear(d_model, latent + P, "kv_down")
        self.kv_norm = RMSNorm(latent)
        # Parameters of their own, not `linear`: the absorbed form needs the matrices themselves.
        self.key_up = nn.Parameter(torch.empty(heads, K, latent))
        self.value_up = nn.Parameter(torch.empty(heads, latent, V))
        self.out = linear(heads * V, d_model, "out")

    def init_weights(self) -> None:
        nn.init.normal_(self.key_up, std=self.latent**-0.5)
        nn.init.normal_(self.value_up, std=self.latent**-0.5)

    def project(
        self, x_BTD: Tensor, ctx: Ctx, tail: State | None, serving: bool
    ) -> tuple[tuple[Tensor, ...], None]:
        B, T = x_BTD.shape[:2]
        K, P, _ = self.widths
        x_BTD = self.position.embed(x_BTD, ctx.layout.fields)
        q_in = x_BTD
        if self.q_down is not None and self.q_norm is not None:
            q_in = self.q_norm(self.q_down(x_BTD, ctx))
        q = self.q(q_in, ctx).view(B, T, self.heads, K + P)
        latent, k_rotary = self.kv_down(x_BTD, ctx).split((self.latent, P), dim=-1)
        q_rotary, k_rotary = self.position.rotate_call(ctx, q[..., K:], k_rotary[:, :, None])
        # One cached head: the normed latent, then the rotated key.
        k = torch.cat((self.kv_norm(latent)[:, :, None], k_rotary), dim=-1)
        q = torch.cat((q[..., :K], q_rotary), dim=-1)
        if ctx.shard is not None:  # others take whole heads
            return (q, *self._raise(k)), None
        return (q, k, k[..., :0]), None

    def _raise(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads `(R, S, H, .)` from the one that is cached."""
        latent = k[:, :, 0, : self.latent]
        key_up, value_up = self.key_up.to(k.dtype), self.value_up.to(k.dtype)
        rotary = k[..., self.latent :].expand(-1, -1, self.heads, -1)
        k = torch.cat((torch.einsum("rsc,hkc->rshk", latent, key_up), rotary), dim=-1)
        return k, torch.einsum("rsc,hcv->rshv", latent, value_up)

    def attend(self, rows: AttentionRows) -> Tensor:
        q, k, v = rows.q, rows.k, rows.v
        mask, score = rows.mask, rows.score._replace(scale=self.scale)
        if rows.cached:
            K, latent = self.widths[0], k[..., : self.latent]
            key_up, value_up = self.key_up.to(q.dtype), self.value_up.to(q.dtype)
            raised = torch.einsum("rthk,hkc->rthc", q[..., :K], key_up)
            o = attention(torch.cat((raised, q[..., K:]), dim=-1), k, latent, mask, score)
            return torch.einsum("rthc,hcv->rthv", o, value_up)
        if not v.shape[-1]:
            k, v = self._raise(k)
        return attention(q, k, v, mask, score)


@MIXERS.register("latent_attention")
class LatentAttentionConfig(LayerConfig):
    """Multi-head latent attention with decoupled rotary positions."""

    kind: Literal["latent_attention"] = "latent_attention"
    heads: Annotated[int, Field(gt=0)] = 4
    head_dim: int | None = Field(
        default=None, gt=0, description="without positions; default: d_model / heads"
    )
    rotary_dim: int | None = Field(
        default=None, gt=0, description="rotated part of a head; default: head_dim / 2"
    )
    value_dim: Annotated[int, Field(gt=0, description="default: head_dim")] | None = None
    latent: int | None = Field(
        default=None, gt=0, description="width of the cached latent; default: 4 head_dim"
    )
    query_latent: int | None = Field(
        default=None, gt=0, description="width of the queries' latent; default: none"
    )
    position: PositionField = Field(default="rope", validate_default=True)

    layer = LatentAttention
    small = {"heads": 2, "latent": 6, "query_latent": 5, "rotary_dim": 4}
