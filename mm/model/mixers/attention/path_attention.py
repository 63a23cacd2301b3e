"""PaTH attention. B rows, T tokens, D model, H heads, G key heads, K head width, N slots, L places
of a call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.kernels.path_attention import move_keys, path_attention
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Out
from mm.model.linears.dense import dense
from mm.model.mixers.attention.base import (
    GroupedAttention,
    HeadsConfig,
    TailedKV,
)
from mm.model.mixers.attention.forget_gate import ForgetGate, ForgetKV, faded_from
from mm.model.mixers.attention.kv_cache import KV, DraftKV, advance
from mm.model.mixers.conv.state import DraftTail, Tail, convolved
from mm.model.positions.base import Position
from mm.model.varlen import PackedRows, paired
from mm.registry import MIXERS
from mm.state import DataclassState, State

TAPS = 3  # of the convolution of the directions


@dataclass(frozen=True)
class DraftPath(DataclassState):
    """The State before a draft call, the call's keys and values, and how its tokens move keys."""

    kv: DraftKV
    w: Tensor  # (N, L, G, K)
    beta: Tensor  # (N, L, G)
    tail: Tail | DraftTail

    def accept(self, n_N: Tensor) -> TailedKV:
        n = torch.minimum(n_N.to(self.kv.length), self.kv.length)
        L, base = self.w.shape[1], self.kv.base
        kept = torch.arange(L, device=n.device) < n[:, None]
        # Places that do not count move nothing.
        w = self.w.masked_fill(~kept[..., None, None], 0)
        beta = self.beta.masked_fill(~kept[..., None], 0)
        keys = torch.cat((base.k.transpose(1, 2).to(self.kv.k.dtype), self.kv.k), dim=1)
        if L:
            keys = move_keys(keys, w, beta)
        old, new = keys.split((base.k.shape[2], L), dim=1)
        moved = replace(base, k=old.transpose(1, 2).to(base.k.dtype).contiguous())
        kv = replace(self.kv, base=moved, k=new.to(self.kv.k.dtype))
        # A tail that no draft call made has nothing to cut.
        tail = self.tail.accept(n) if isinstance(self.tail, DraftTail) else self.tail
        return TailedKV(kv.accept(n), tail)

    def commit(self) -> TailedKV:
        """Everything drafted counts."""
        return self.accept(self.kv.length)


class PathAttention(GroupedAttention):
    """Attention between ``q_i`` and ``k_j`` through the product of one Householder-like matrix a
    token between them, ``I - beta w w^T``, which the tokens choose.

    ``w`` is a low-rank projection, convolved over three tokens, of length 1; ``beta = 2
    sigmoid(.)``. It knows no other positions; the cached keys are moved by every token. With a
    forget gate (PaTH-FoX) what lies behind closed gates fades too.

    Source: Yang et al. 2025, PaTH Attention (arXiv:2505.16381), section 3; gate:
    `mm.model.mixers.attention.forget_gate`.
    """

    caps = Caps(causal=True, step=True)

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rank: int,
        qk_norm: bool,
        forget: bool,
        linear: LinearFactory,
    ):
        super().__init__(d_model, heads, kv_heads, head_dim, Position(), linear, qk_norm)
        width = kv_heads * head_dim
        self.w_down = linear(d_model, rank, "w_down")
        self.w_up = linear(rank, width, "w_up")
        self.conv_weight = nn.Parameter(torch.empty(TAPS, width))
        self.beta = linear(d_model, kv_heads, "beta")
        self.beta_bias = nn.Parameter(torch.empty(kv_heads))
        self.forget = ForgetGate(d_model, heads, linear) if forget else None

    def init_weights(self) -> None:
        nn.init.normal_(self.conv_weight, std=TAPS**-0.5)
        nn.init.zeros_(self.beta_bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        assert state is None or isinstance(state, TailedKV | DraftPath | ForgetKV)
        past, gates = state.commit() if state is not None else None, None
        if isinstance(past, ForgetKV):
            past, gates = past.kv, past.gate
            assert isinstance(gates, KV)
        q, k, v = self.projected(x_BTD, ctx)
        u, tail = convolved(
            self.w_up(self.w_down(x_BTD, ctx), ctx),
            self.conv_weight,
            torch.zeros_like(self.conv_weight[0]),
            ctx,
            past.tail if past is not None else None,
        )
        wide = torch.promote_types(u.dtype, torch.float32)
        w = F.normalize(F.silu(u.to(wide)).view_as(k), dim=-1, eps=1e-6)
        beta = 2 * torch.sigmoid(self.beta(x_BTD, ctx).to(wide) + self.beta_bias.to(wide))
        after: State | None = None
        parts = (q, k, v, w, beta, *([self.forget(x_BTD, ctx)] if self.forget is not None else []))
        if past is None:
            y = self.whole(parts, ctx)
        else:
            assert isinstance(tail, Tail | DraftTail)
            y, after = self._forward_cached(parts, ctx, past, tail, gates)
        return Out(self.out(y.flatten(2), ctx), after)

    def attend(  # type: ignore[override]
        self,
        q_RTHK: Tensor,
        k_RTGK: Tensor,
        v_RTGV: Tensor,
        w_RTGK: Tensor,
        beta_RTG: Tensor,
        *rest: Any,
    ) -> Tensor:
        """``rest``: log forget gates `(R, T, H)` if there are any, then ``allowed`` and what else
        `CachedAttention.attend` takes.
        """
        *kept, allowed, _, _, _ = rest
        faded = kept[0].cumsum(1) if kept else None
        mask, score = MaskSpec(allowed), ScoreSpec(fade_RTH=faded, fade_RSH=faded)
        return path_attention(q_RTHK, k_RTGK, v_RTGV, w_RTGK, beta_RTG, mask, score)

    def _forward_cached(
        self,
        parts: tuple[Tensor, ...],
        ctx: Ctx,
        past: TailedKV,
        tail: Tail | DraftTail,
        gates: KV | None,
    ) -> tuple[Tensor, State]:
        (B, T), cache = parts[0].shape[:2], past.kv
        assert isinstance(cache, KV)
        docs = PackedRows.of(ctx.layout, cache.count.shape[0])
        f = docs.fields(ctx.layout.fields)
        q, k, v, w, beta, *kept = map(docs.unpack, parts)
        past_k, past_v, past_f = cache.past(docs, f)
        keys = torch.cat((past_k.transpose(1, 2).to(k.dtype), k), dim=1)
        values = torch.cat((past_v.transpose(1, 2).to(v.dtype), v), dim=1)
        known = paired(lambda old, new: torch.cat((old, new), dim=1), past_f, f)
        mask, score = MaskSpec(ctx.mask.dense(f, known)), ScoreSpec()
        drafted_gate: KV | DraftKV | None = None
        if gates is not None:
            faded = faded_from(gates, kept[0], docs)
            before = gates.past(docs, f)[0][..., 0].transpose(1, 2)
            both = torch.cat((before.to(faded.dtype), faded), dim=1)
            score = ScoreSpec(fade_RTH=faded, fade_RSH=both)
            none = faded.new_empty(*faded.shape, 0)
            drafted_gate = advance(gates, faded[..., None], none, f, docs, True)
        y = path_attention(q, keys, values, w, beta, mask, score)
        drafted = advance(cache, k, v, f, docs, True)
        assert isinstance(drafted, DraftKV)
        taken = docs.written(cache.count.shape[0]).take
        after: DraftPath | ForgetKV = DraftPath(drafted, taken(w), taken(beta), tail)
        if drafted_gate is not None:
            after = ForgetKV(after, drafted_gate)
        return docs.pack(y, B, T), after if ctx.draft else after.commit()

    def initial_state(self, n: int, max_len: int) -> TailedKV | ForgetKV:
        width, like = self.kv_heads * self.head_dim, self.stored_as()
        tail = Tail(like.new_zeros(n, TAPS - 1, width))
        kv = TailedKV(super().initial_state(n, max_len), tail)
        if self.forget is None:
            return kv
        wide = like.to(torch.promote_types(like.dtype, torch.float32))
        return ForgetKV(kv, KV.empty(n, self.heads, max_len, 1, 0, False, wide))

    def state_bytes(self, n: int, max_len: int) -> int:
        item = self._like().element_size()
        width = (TAPS - 1) * self.kv_heads * self.head_dim
        kept = KV.bytes(n, self.heads, max_len, 1, 0, max(item, 4)) if self.forget else 0
        return super().state_bytes(n, max_len) + n * width * item + kept


@MIXERS.register("path_attention")
class PathAttentionConfig(HeadsConfig):
    """PaTH attention: positions are accumulated Householder products."""

    kind: Literal["path_attention"] = "path_attention"
    rank: Annotated[int, Field(gt=0, description="of the directions' projection")] = 32
    qk_norm: bool = False
    forget_gate: Annotated[
        bool, Field(description="PaTH-FoX: what lies behind closed gates fades")
    ] = False
    position: Literal["none"] = "none"  # type: ignore[assignment]

    def build(self, d_model: int, linear: LinearFactory = dense) -> PathAttention:
        heads, kv_heads, head_dim = self.sizes(d_model)
        return PathAttention(
            d_model,
            heads,
            kv_heads,
            head_dim,
            self.rank,
            self.qk_norm,
            self.forget_gate,
            linear,
        )

    @classmethod
    def smallest(cls) -> PathAttentionConfig:
        return cls(heads=2, kv_heads=1, rank=3)
