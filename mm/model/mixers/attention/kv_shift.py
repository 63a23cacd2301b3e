"""KV-shifting attention.

B rows, T tokens, D model, H heads, G key heads, K head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.mixers.attention.base import GroupedAttention, HeadsConfig
from mm.model.mixers.conv.state import TokenTail
from mm.registry import MIXERS
from mm.state import State


class KVShift(GroupedAttention):
    """Attention to ``a_1 k_i + a_2 k_{i-1}`` and ``b_1 v_i + b_2 v_{i-1}``.

    The four are numbers of a key head: one layer finds what followed an earlier copy of a token.

    Source: Xu et al. 2024, KV Shifting Attention (arXiv:2411.19574), section 3; keys are rotated
    after the shift. The two weights of a head begin with sum 1.
    """

    caps = replace(GroupedAttention.caps, shard="ulysses")

    tailed = True
    replays = True

    def __init__(self, d_model: int, config: KVShiftConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        self.tail = TokenTail(2 * self.kv_heads * self.head_dim, 1)
        self.mix = nn.Parameter(torch.empty(2, 2, self.kv_heads))  # (previous, own) x (key, value)

    def init_weights(self) -> None:
        with torch.no_grad():
            own = torch.empty_like(self.mix[1]).uniform_()
            self.mix.copy_(torch.stack((1 - own, own)))

    def shift_keys(
        self, x_BTD: Tensor, kv_BTGK: Tensor, ctx: Ctx, tail: State | None
    ) -> tuple[Tensor, State | None]:
        weight = self.mix[..., None].expand(-1, -1, -1, self.head_dim).flatten(1)
        kv = kv_BTGK.flatten(2)
        kv, tail = self.tail.convolve(kv, weight, torch.zeros_like(weight[0]), ctx, tail)
        return kv.view_as(kv_BTGK), tail


@MIXERS.register("kv_shift")
class KVShiftConfig(HeadsConfig):
    """Attention whose keys and values take a share of the previous token's."""

    kind: Literal["kv_shift"] = "kv_shift"

    layer = KVShift
