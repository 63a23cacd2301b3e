"""Attention whose values take a share of the first layer's.

B rows, T tokens, D model, H heads, G key heads, K head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Out
from mm.model.mixers.attention.base import GroupedAttention, HeadsConfig
from mm.registry import MIXERS
from mm.state import State

FIRST = "first_values"  # published, with what its shape depends on


class ValueResidual(GroupedAttention):
    """Attention to ``V'_n = l_1 V_1 + l_2 V_n``: V_1 are the values of the first such layer.

    Both numbers are learnt, of each layer, and begin at 1/2. The first layer adds its own values to
    themselves, which its numbers begin by leaving as they are. Each layer caches what it made.

    Source: Zhou et al. 2024, Value Residual Learning (arXiv:2410.17897), section 3.2, ResFormer
    with learnable numbers.
    """

    def __init__(self, d_model: int, config: ValueResidualConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        self.share = nn.Parameter(torch.empty(2))
        self.key = f"{FIRST}.{self.kv_heads}.{self.head_dim}"
        self.caps = replace(self.caps, shard="ulysses", publishes=frozenset({self.key}))

    def init_weights(self) -> None:
        nn.init.constant_(self.share, 0.5)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        if self.key in ctx.published:
            return super().forward(x_BTD, ctx, state)
        made: list[Tensor] = []  # by `shift_keys`, of this call
        here = replace(ctx, published={**ctx.published, self.key: made})
        out = super().forward(x_BTD, here, state)
        return out._replace(ctx=replace(ctx, published={**ctx.published, self.key: made[0]}))

    def shift_keys(
        self, x_BTD: Tensor, kv_BTGK: Tensor, ctx: Ctx, tail: State | None
    ) -> tuple[Tensor, State | None]:
        k, v = kv_BTGK.chunk(2, dim=2)
        first = ctx.published[self.key]
        if isinstance(first, list):
            first.append(v)
            first = v
        share = self.share.to(v.dtype)
        return torch.cat((k, share[0] * first + share[1] * v), dim=2), tail


@MIXERS.register("value_residual")
class ValueResidualConfig(HeadsConfig):
    """Attention whose values take a share of the first layer's (ResFormer)."""

    kind: Literal["value_residual"] = "value_residual"

    layer = ValueResidual
