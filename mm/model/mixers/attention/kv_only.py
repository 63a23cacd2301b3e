"""Attention without queries of their own.

B rows, T tokens, D model, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.mixers.attention.base import AttentionBase, HeadsConfig
from mm.model.mixers.attention.kv_cache import KeyValueCache
from mm.registry import MIXERS
from mm.state import State


class KVOnly(AttentionBase):
    """``softmax(k k^T / sqrt(K)) v``: keys are their own queries.

    Logits are symmetric unless a position adds to them.

    Source: Borji 2023, Key-Value Transformer (arXiv:2305.19129), section 2; its KV+Pos adds a
    positional term to the scores: a position that scores (`t5_bias`, `alibi`).
    """

    caps = replace(AttentionBase.caps, shard="ulysses")

    def __init__(self, d_model: int, config: KVOnlyConfig, linear: LinearFactory):
        heads, kv_heads, head_dim = config.sizes(d_model)
        if kv_heads != heads:
            raise ValueError("kv_only: every head has its own key; leave kv_heads out")
        super().__init__(config.build_position(head_dim, d_model))
        self.heads, self.head_dim = heads, head_dim
        self.cache = KeyValueCache(heads, head_dim, head_dim)
        self.kv = linear(d_model, 2 * heads * head_dim, "kv")
        self.out = linear(heads * head_dim, d_model, "out")

    def project(
        self, x_BTD: Tensor, ctx: Ctx, tail: State | None, serving: bool
    ) -> tuple[tuple[Tensor, ...], None]:
        B, T = x_BTD.shape[:2]
        x_BTD = self.position.embed(x_BTD, ctx.layout.fields)
        kv = self.kv(x_BTD, ctx).view(B, T, 2 * self.heads, self.head_dim)
        k, v = kv.chunk(2, dim=2)
        return (*self.position.rotate_call(ctx, k, k), v), None


@MIXERS.register("kv_only")
class KVOnlyConfig(HeadsConfig):
    """Attention whose keys are their own queries."""

    kind: Literal["kv_only"] = "kv_only"

    layer = KVOnly
    small = {"heads": 2}
