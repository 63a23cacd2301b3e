"""KV-shifting attention. B rows, T tokens, D model, H heads, G key heads, K head width."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Out
from mm.model.linears.dense import dense
from mm.model.mixers.attention.base import GroupedAttention, HeadsConfig, TailedKV
from mm.model.mixers.attention.kv_cache import KV
from mm.model.mixers.conv.state import DraftTail, Tail, convolved
from mm.model.positions.base import Position
from mm.registry import MIXERS
from mm.state import State


class KVShift(GroupedAttention):
    """Attention to ``a_1 k_i + a_2 k_{i-1}`` and ``b_1 v_i + b_2 v_{i-1}``, with one number a key
    head each: one layer finds what followed an earlier copy of a token.

    Source: Xu et al. 2024, KV Shifting Attention (arXiv:2411.19574), section 3; keys are rotated
    after the shift. The two weights of a head begin with sum 1.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        position: Position,
        linear: LinearFactory,
    ):
        super().__init__(d_model, heads, kv_heads, head_dim, position, linear)
        self.mix = nn.Parameter(torch.empty(2, 2, kv_heads))  # (previous, own) x (key, value)

    def init_weights(self) -> None:
        with torch.no_grad():
            own = torch.empty_like(self.mix[1]).uniform_()
            self.mix.copy_(torch.stack((1 - own, own)))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        assert state is None or isinstance(state, TailedKV)
        H, G, K = self.heads, self.kv_heads, self.head_dim
        B, T = x_BTD.shape[:2]
        past = state.commit() if state is not None else None
        x_BTD = self.position.embed(x_BTD, ctx.layout.fields)
        q, kv = self.qkv(x_BTD, ctx).split((H * K, 2 * G * K), dim=-1)
        weight = self.mix[..., None].expand(-1, -1, -1, K).reshape(2, 2 * G * K)
        kv, tail = convolved(
            kv, weight, torch.zeros_like(weight[0]), ctx, past.tail if past is not None else None
        )
        k, v = kv.view(B, T, 2 * G, K).split(G, dim=2)
        q, k = self.rotated(q.view(B, T, H, K), k, ctx)
        cache = past.kv if past is not None else None
        assert cache is None or isinstance(cache, KV)
        y, stored = self.attended(q, k, v, ctx, cache)
        after = None
        if stored is not None:
            assert isinstance(tail, Tail | DraftTail)
            after = TailedKV(stored, tail)
        return Out(self.out(y.reshape(B, T, H * K), ctx), after)

    def initial_state(self, n: int, max_len: int) -> TailedKV:
        width = 2 * self.kv_heads * self.head_dim
        tail = Tail(self.stored_as().new_zeros(n, 1, width))
        return TailedKV(super().initial_state(n, max_len), tail)

    def state_bytes(self, n: int, max_len: int) -> int:
        width = 2 * self.kv_heads * self.head_dim
        return super().state_bytes(n, max_len) + n * width * self._like().element_size()


@MIXERS.register("kv_shift")
class KVShiftConfig(HeadsConfig):
    """Attention whose keys and values take a share of the previous token's."""

    kind: Literal["kv_shift"] = "kv_shift"

    def build(self, d_model: int, linear: LinearFactory = dense) -> KVShift:
        heads, kv_heads, head_dim = self.sizes(d_model)
        position = self.placed(head_dim, d_model)
        return KVShift(d_model, heads, kv_heads, head_dim, position, linear)

    @classmethod
    def smallest(cls) -> KVShiftConfig:
        return cls(heads=2, kv_heads=1)
