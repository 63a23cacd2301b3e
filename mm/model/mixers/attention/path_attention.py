"""PaTH attention.

B rows, T tokens, D model, H heads, G key heads, K head width, N slots, R rows of one document, L
their length, S keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.attention.spec import MaskSpec
from mm.kernels.path_attention import move_keys, path_attention
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory
from mm.model.mixers.attention.base import AttentionRows, GroupedAttention, HeadsConfig
from mm.model.mixers.attention.forget_gate import ForgetGate
from mm.model.mixers.attention.kv_cache import KV
from mm.model.mixers.conv.state import TokenTail
from mm.model.positions.base import Position
from mm.registry import MIXERS
from mm.state import State

CONV_SIZE = 3  # of the convolution of the directions


class PathAttention(GroupedAttention):
    """Attention through the product of one Householder-like matrix a token in between.

    The tokens between ``q_i`` and ``k_j`` choose it: ``I - beta w w^T``.
    ``w`` is a low-rank projection, convolved over three tokens, of length 1; ``beta = 2
    sigmoid(.)``. It knows no other positions; the cached keys are moved by every token. With a
    forget gate (PaTH-FoX) what lies behind closed gates fades too.

    Source: Yang et al. 2025, PaTH Attention (arXiv:2505.16381), section 3; gate:
    `mm.model.mixers.attention.forget_gate`.
    """

    caps = Caps(causal=True, step=True, shard="ulysses")
    replays = True
    tailed = True
    separate_rows = True

    def __init__(self, d_model: int, config: PathAttentionConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        heads, kv_heads, rank = self.heads, self.kv_heads, config.rank
        width = kv_heads * self.head_dim
        self.tail = TokenTail(width, CONV_SIZE - 1)
        self.w_down = linear(d_model, rank, "w_down")
        self.w_up = linear(rank, width, "w_up")
        self.conv_weight = nn.Parameter(torch.empty(CONV_SIZE, width))
        self.beta = linear(d_model, kv_heads, "beta")
        self.beta_bias = nn.Parameter(torch.empty(kv_heads))
        if config.forget_gate:
            self.forget = ForgetGate(d_model, heads, linear)

    def init_weights(self) -> None:
        nn.init.normal_(self.conv_weight, std=CONV_SIZE**-0.5)
        nn.init.zeros_(self.beta_bias)

    def project(
        self, x_BTD: Tensor, ctx: Ctx, tail: State | None, serving: bool
    ) -> tuple[tuple[Tensor, ...], State | None]:
        (q, k, v, *kept), _ = super().project(x_BTD, ctx, None, serving)
        u = self.w_up(self.w_down(x_BTD, ctx), ctx)
        none = torch.zeros_like(self.conv_weight[0])
        u, tail = self.tail.convolve(u, self.conv_weight, none, ctx, tail)
        wide = torch.promote_types(u.dtype, torch.float32)
        w = F.normalize(F.silu(u.to(wide)).view_as(k), dim=-1, eps=1e-6)
        beta = 2 * torch.sigmoid(self.beta(x_BTD, ctx).to(wide) + self.beta_bias.to(wide))
        return (q, k, v, w, beta, *kept), tail

    def attend(self, rows: AttentionRows) -> Tensor:
        """``more``: directions `(R, T, G, K)`, betas `(R, T, G)`, then as of any attention."""
        q, k, v, mask, score, (w, beta, *kept), _ = rows
        if mask.is_set():
            mask = MaskSpec(mask.dense(q.shape[1], k.shape[1], q.device))
        return path_attention(q, k, v, w, beta, mask, rows.fade(*kept) if kept else score)

    def _forward_cached(
        self, parts: tuple[Tensor, ...], ctx: Ctx, cache: State, gates: State | None = None
    ) -> tuple[Any, ...]:
        (q, k, v, w, beta, *kept), after = parts, []
        assert isinstance(cache, KV)
        seen = self.cache.look_back(k, v, ctx, cache)
        if self.forget is not None:
            assert gates is not None
            *kept, gates = self.forget.extend(kept[0], ctx, gates, copy=True)
            after = [gates]
        docs, L = seen.docs, seen.fields.document.shape[1]
        q, w, beta = docs.unpack(q), docs.unpack(w), docs.unpack(beta)
        y = docs.pack(self.attend_cached(q, seen, ctx, w, beta, *kept))
        if L:
            # What follows a document moves nothing.
            w = w.masked_fill(~docs.valid[..., None, None], 0)
            beta = beta.masked_fill(~docs.valid[..., None], 0)
            seen = seen._replace(k=move_keys(seen.k, w, beta))
        old, new = seen.k.split((seen.cached, L), dim=1)
        moved = docs.slot_writes().write(cache.k, old.transpose(1, 2)).contiguous()
        stored = replace(cache, k=moved).extend(new, seen.v[:, seen.cached :], seen.fields, docs)
        return y, stored, *after


@MIXERS.register("path_attention")
class PathAttentionConfig(HeadsConfig):
    """PaTH attention: positions are accumulated Householder products."""

    kind: Literal["path_attention"] = "path_attention"
    rank: Annotated[int, Field(gt=0, description="of the directions' projection")] = 32
    qk_norm: bool = False
    forget_gate: bool = Field(
        default=False, description="PaTH-FoX: what lies behind closed gates fades"
    )
    position: Literal["none"] = "none"  # type: ignore[assignment]

    layer = PathAttention
    small = {"heads": 2, "kv_heads": 1, "rank": 3}

    def build_position(self, width: int, d_model: int) -> Position:
        return Position()
