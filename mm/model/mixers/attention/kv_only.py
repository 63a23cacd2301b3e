"""Attention without queries of their own. B rows, T tokens, D model, H heads, K head width."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Out
from mm.model.linears.dense import dense
from mm.model.mixers.attention.base import CachedAttention, HeadsConfig, Sizes
from mm.model.mixers.attention.kv_cache import KV, DraftKV
from mm.model.positions.base import Position
from mm.registry import MIXERS
from mm.state import State


class KVOnly(CachedAttention):
    """``softmax(k k^T / sqrt(K)) v``: keys are their own queries, so logits are symmetric unless a
    position adds to them.

    Source: Borji 2023, Key-Value Transformer (arXiv:2305.19129), section 2; its KV+Pos adds a
    positional term to the scores: a position that scores (`t5_bias`, `alibi`).
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        head_dim: int,
        position: Position,
        linear: LinearFactory,
    ):
        super().__init__(Sizes(heads, head_dim, head_dim), position)
        self.heads, self.head_dim = heads, head_dim
        self.kv = linear(d_model, 2 * heads * head_dim, "kv")
        self.out = linear(heads * head_dim, d_model, "out")

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        assert state is None or isinstance(state, KV | DraftKV)
        H, K = self.heads, self.head_dim
        B, T = x_BTD.shape[:2]
        x_BTD = self.position.embed(x_BTD, ctx.layout.fields)
        k, v = self.kv(x_BTD, ctx).view(B, T, 2 * H, K).chunk(2, dim=2)
        q, k = self.rotated(k, k, ctx)
        y, after = self.attended(q, k, v, ctx, state.commit() if state is not None else None)
        return Out(self.out(y.reshape(B, T, H * K), ctx), after)


@MIXERS.register("kv_only")
class KVOnlyConfig(HeadsConfig):
    """Attention whose keys are their own queries."""

    kind: Literal["kv_only"] = "kv_only"

    def build(self, d_model: int, linear: LinearFactory = dense) -> KVOnly:
        heads, kv_heads, head_dim = self.sizes(d_model)
        if kv_heads != heads:
            raise ValueError("kv_only: every head has its own key; leave kv_heads out")
        position = self.placed(head_dim, d_model)
        return KVOnly(d_model, heads, head_dim, position, linear)

    @classmethod
    def smallest(cls) -> KVOnlyConfig:
        return cls(heads=2)
