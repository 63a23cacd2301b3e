"""Differential attention.

B rows, T tokens, D model, H heads of two query parts, G key heads, K width of a part, R rows of one
document, S keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.attention import attention
from mm.kernels.attention.spec import ScoreSpec
from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.mixers.attention.base import AttentionBase, AttentionRows, HeadsConfig
from mm.model.mixers.attention.kv_cache import KeyValueCache
from mm.model.norm import RMSNorm
from mm.model.positions.none import Tempered
from mm.registry import MIXERS
from mm.state import State


class DifferentialAttention(AttentionBase):
    """``(softmax(q1 k1) - lambda softmax(q2 k2)) v``: what both maps attend to cancels.

    ``lambda = exp(a1 . b1) - exp(a2 . b2) + lambda_init`` with vectors of the layer; each head's
    output passes an RMS norm and is scaled by ``1 - lambda_init``.

    Source: Ye et al. 2024, Differential Transformer (arXiv:2410.05258), section 2.1, eq. 1-3.
    """

    caps = replace(AttentionBase.caps, shard="ulysses")

    def __init__(self, d_model: int, config: DifferentialAttentionConfig, linear: LinearFactory):
        heads, kv_heads, head_dim = config.sizes(d_model)
        if head_dim % 2:
            raise ValueError(f"differential_attention halves its heads: head_dim {head_dim} is odd")
        width = head_dim // 2
        position = config.build_position(width, d_model)
        if isinstance(position, Tempered) and position.temperature is not None:
            raise ValueError(
                "differential_attention: a temperature by head does not fit heads of two maps: set "
                "position.temperature to false"
            )
        super().__init__(position)
        self.cache = KeyValueCache(kv_heads, 2 * width, 2 * width)
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.lambda_init = config.lambda_init
        self.qkv = linear(d_model, (heads + 2 * kv_heads) * 2 * width, "qkv")
        self.out = linear(heads * 2 * width, d_model, "out")
        self.lambdas = nn.Parameter(torch.empty(2, 2, width))  # (map) x (query, key)
        self.norm = RMSNorm(2 * width)

    def init_weights(self) -> None:
        nn.init.normal_(self.lambdas, std=0.1)

    def project(
        self, x_BTD: Tensor, ctx: Ctx, tail: State | None, serving: bool
    ) -> tuple[tuple[Tensor, ...], None]:
        H, G, K = self.heads, self.kv_heads, self.width
        B, T = x_BTD.shape[:2]
        x_BTD = self.position.embed(x_BTD, ctx.layout.fields)
        qkv = self.qkv(x_BTD, ctx).view(B, T, 2 * H + 4 * G, K)
        q, k, v = qkv.split((2 * H, 2 * G, 2 * G), dim=2)
        q, k = self.position.rotate_call(ctx, q, k)
        # A key head is cached whole: its two keys, and the value that both maps read.
        return (q, k.reshape(B, T, G, 2 * K), v.reshape(B, T, G, 2 * K)), None

    def finish(self, y: Tensor, x_BTD: Tensor, ctx: Ctx, serving: bool) -> Tensor:
        y = self.norm(y) * (1 - self.lambda_init)
        return self.out(y.flatten(2), ctx)

    def check_shard(self, size: int) -> str | None:
        if self.kv_heads % size == 0:
            return None
        return f"{self.kv_heads} key heads do not divide over {size} processes"

    def balance(self) -> Tensor:
        """lambda, ``()`` float32 or wider."""
        wide = self.lambdas.to(torch.promote_types(self.lambdas.dtype, torch.float32))
        first, second = wide.prod(1).sum(-1).exp().unbind()
        return first - second + self.lambda_init

    def attend(self, rows: AttentionRows) -> Tensor:
        q, k, v, mask, score, *_ = rows
        (R, T), (S, G, V) = q.shape[:2], v.shape[1:]
        bias = score.total_bias()
        if bias is not None:  # by head, whose queries have two parts in each key head
            by_part = bias.unflatten(1, (G, 1, -1)).expand(-1, -1, 2, -1, -1, -1)
            bias = by_part.flatten(1, 3)
        keys, values = k.reshape(R, S, 2 * G, self.width), v.repeat_interleave(2, dim=2)
        o = attention(q, keys, values, mask, ScoreSpec(bias))
        first, second = o.view(R, T, G, 2, q.shape[2] // (2 * G), V).unbind(3)
        return (first - self.balance().to(o.dtype) * second).flatten(2, 3)


@MIXERS.register("differential_attention")
class DifferentialAttentionConfig(HeadsConfig):
    """The difference of two softmax maps."""

    kind: Literal["differential_attention"] = "differential_attention"
    lambda_init: float = Field(
        default=0.8, ge=0, lt=1, description="paper: 0.8 - 0.6 exp(-0.3 l) for layer l = 0, 1, ..."
    )

    layer = DifferentialAttention
