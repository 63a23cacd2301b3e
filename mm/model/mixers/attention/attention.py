"""Softmax attention.

B rows, T tokens, D model, H heads, G key heads, K head width, R rows of one document.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.attention.spec import ScoreSpec
from mm.layout import Fields
from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.mixers.attention.base import AttentionBase, GroupedAttention, HeadsConfig
from mm.model.mixers.attention.forget_gate import ForgetGate
from mm.model.mixers.attention.token_shift import TokenShift
from mm.model.norm import HeadNorm
from mm.registry import MIXERS
from mm.state import State


class Attention(GroupedAttention):
    """Grouped-query attention over `Ctx.mask` and, if set, its own window.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); grouped heads: Ainslie et al. 2023
    (arXiv:2305.13245);
    QK-norm: Henry et al. 2020 (arXiv:2010.04245) with RMS norm; clip: OLMo (arXiv:2402.00838), as
    in its code; window: Beltagy et al. 2020
    (arXiv:2004.05150). Soft-cap: Gemma 2 (arXiv:2408.00118), section 2. Sinks: gpt-oss
    (arXiv:2508.10925), section 2. Scale by log n: Chiang & Cholak 2022 (arXiv:2202.12172), section
    5.3. Forget gate: `mm.model.mixers.attention.forget_gate`. Output gate: Qiu et al. 2025
    (arXiv:2505.06708).
    Output norm, norms by head, token shift: Lin et al. 2025 (arXiv:2503.02130), Pro block.
    """

    caps = replace(AttentionBase.caps, shard="ulysses")
    knows = frozenset({"gain", "ids"})

    def __init__(self, d_model: int, config: AttentionConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        H, G, K = self.heads, self.kv_heads, self.head_dim
        self.softcap, self.log_n = config.softcap, config.log_n
        scale = config.query_scale
        self.query_factor = None if scale is None else scale * K**0.5
        self.out_norm = HeadNorm(H, K) if config.out_norm else None
        # What was shifted cannot be cut: a draft call runs again.
        self.replays = self.tailed = config.token_shift
        self.shift = TokenShift(d_model, G, K, linear) if config.token_shift else None
        self.sink = nn.Parameter(torch.empty(H)) if config.sinks else None
        if config.forget_gate:
            self.forget = ForgetGate(d_model, H, linear, self.window)
        self.gate = linear(d_model, H * K, "gate") if config.gate else None

    def init_weights(self) -> None:
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def shift_keys(
        self, x_BTD: Tensor, kv_BTGK: Tensor, ctx: Ctx, tail: State | None
    ) -> tuple[Tensor, State | None]:
        return (kv_BTGK, None) if self.shift is None else self.shift(x_BTD, kv_BTGK, ctx, tail)

    def project(
        self, x_BTD: Tensor, ctx: Ctx, tail: State | None, serving: bool
    ) -> tuple[tuple[Tensor, ...], State | None]:
        (q, *kv), tail = super().project(x_BTD, ctx, tail, serving)
        if self.query_factor is not None:
            q = q * self.query_factor
        if self.log_n is not None:
            q = self._scale_by_log_n(q, ctx.layout.fields)
        return (q, *kv), tail

    def _scale_by_log_n(self, q: Tensor, f: Fields) -> Tensor:
        """Queries times ``log n / log log_n``; n = how many tokens there are up to the query."""
        assert self.log_n is not None
        n = f.position[..., 0] + 1
        n = n if self.window is None else n.clamp_max(self.window)
        wide = torch.promote_types(q.dtype, torch.float32)
        return (q * (n.to(wide).log() / math.log(self.log_n))[:, :, None, None]).to(q.dtype)

    def scores(self, q: Tensor, fq: Fields, fk: Fields) -> ScoreSpec:
        return super().scores(q, fq, fk)._replace(softcap=self.softcap, sink_H=self.sink)

    def finish(self, y: Tensor, x_BTD: Tensor, ctx: Ctx, serving: bool) -> Tensor:
        if self.out_norm is not None:
            y = self.out_norm(y)
        y = y.flatten(2)
        if self.gate is not None:
            x_BTD = self.position.embed(x_BTD, self.position_fields(ctx, serving))
            y = y * self.gate(x_BTD, ctx).sigmoid().to(y.dtype)
        return self.out(y, ctx)

    def weights(self, x_BTD: Tensor, ctx: Ctx) -> Tensor:
        """Attention weights `(B, T, H, T)` of whole documents, to look at: O(T^2) memory."""
        B, T = x_BTD.shape[:2]
        (q, k, _, *kept), _ = self.project(x_BTD, ctx, None, False)
        one = torch.eye(T, dtype=q.dtype, device=q.device)[None, :, None]
        return self._forward_full((q, k, one.expand(B, T, self.kv_heads, T), *kept), ctx)


@MIXERS.register("attention")
class AttentionConfig(HeadsConfig):
    """Grouped-query attention with a position plug, optional QK-norm and optional own window."""

    kind: Literal["attention"] = "attention"
    window: int | None = Field(
        default=None, gt=0, description="tokens a query sees, itself included"
    )
    qk_norm: bool | Literal["heads", "full", "zero_centred"] = Field(
        default=True,
        description="heads: with scales of each head's own; full: over all heads; "
        "zero_centred: scales 1 + weight",
    )
    norm_eps: Annotated[float, Field(gt=0, le=1, description="of qk_norm")] = 1e-6
    clip: Annotated[float, Field(gt=0, description="bound of what qkv gives")] | None = None
    query_scale: float | None = Field(
        default=None, gt=0, description="factor of the logits; default 1 / sqrt(head_dim)"
    )
    softcap: Annotated[float, Field(gt=0, description="bound of the logits")] | None = None
    sinks: bool = Field(default=False, description="a learned logit a head that attends to nothing")
    log_n: float | None = Field(
        default=None, gt=1, description="length at which scaling by log n is 1"
    )
    forget_gate: bool = Field(default=False, description="FoX: what lies behind closed gates fades")
    gate: Annotated[bool, Field(description="sigmoid gate before the output projection")] = False
    out_norm: Annotated[bool, Field(description="RMSNorm of each head's output")] = False
    token_shift: bool = Field(
        default=False, description="keys and values take a gated share of the previous token's"
    )

    layer = Attention
