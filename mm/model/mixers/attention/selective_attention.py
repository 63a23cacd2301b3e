"""Selective attention. B rows, T tokens, D model, H heads, G key heads, K head width, N slots, C
cache places, R rows of one document, L their length, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Out
from mm.model.linears.dense import dense
from mm.model.mixers.attention.base import GroupedAttention, HeadsConfig
from mm.model.mixers.attention.kv_cache import KV, DraftKV, advance
from mm.model.varlen import PackedRows, paired
from mm.registry import MIXERS
from mm.state import DataclassState, State


@dataclass(frozen=True)
class SelectedKV(DataclassState):
    """Cached keys and values, and how strongly each was masked by the tokens since."""

    kv: KV
    masked: Tensor  # (N, C) float32 or wider

    def accept(self, n_N: Tensor) -> SelectedKV:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> SelectedKV:
        return self


@dataclass(frozen=True)
class DraftSelectedKV(DataclassState):
    """The State before a draft call, and what each of its tokens masks."""

    kv: DraftKV
    masked: Tensor  # (N, C)
    past_NLC: Tensor  # of what was cached
    own_NLL: Tensor  # of the call

    def accept(self, n_N: Tensor) -> SelectedKV:
        n = torch.minimum(n_N.to(self.kv.length), self.kv.length)
        L, C = self.own_NLL.shape[1], self.masked.shape[1]
        token = torch.arange(L, device=n.device)
        kept = (token < n[:, None])[..., None]
        past = self.past_NLC.masked_fill(~kept, 0).sum(1)
        own = self.own_NLL.masked_fill(~kept, 0).sum(1)
        begun = torch.where(self.kv.fresh[:, None], 0.0, self.masked + past)
        first = torch.where(self.kv.fresh, 0, self.kv.base.count)
        # Places past the last accepted token get zeros added, wherever they point.
        to = (first[:, None] + token).clamp_max(C - 1)
        return SelectedKV(self.kv.accept(n), begun.scatter_add(1, to, own))

    def commit(self) -> SelectedKV:
        return self.accept(self.kv.length)


class SelectiveAttention(GroupedAttention):
    """Attention in which a token can mask earlier ones for all later tokens and heads.

    ``S = relu(q k / sqrt(K))`` of head 0, zero for the token itself and for the document's first
    token; ``F_i = sum of S_j over j < i`` is subtracted from the logits of every head.

    Source: Leviathan et al. 2024, Selective Attention Improves Transformer (arXiv:2410.02703),
    section 3 and its listing.
    """

    caps = Caps(causal=True, step=True)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        assert state is None or isinstance(state, SelectedKV | DraftSelectedKV)
        q, k, v = self.projected(x_BTD, ctx)
        after: State | None = None
        if state is None:
            y = self.whole((q, k, v), ctx)
        else:
            y, after = self._forward_cached(q, k, v, ctx, state.commit())
        return Out(self.out(y.flatten(2), ctx), after)

    def selection(self, q_RTHK: Tensor, k_RSGK: Tensor, masks_RTS: Tensor) -> Tensor:
        """`(R, T, S)` float32 or wider: how strongly each query masks each key, where it may."""
        q, k = q_RTHK[:, :, 0], k_RSGK[:, :, 0]
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            logits = q.to(wide) @ k.to(wide).mT * self.head_dim**-0.5
        return logits.relu().masked_fill(~masks_RTS, 0)

    def attend(
        self,
        q_RTHK: Tensor,
        k_RSGK: Tensor,
        v_RSGV: Tensor,
        allowed_RTS: Tensor | None,
        causal: bool,
        bias_RHTS: Tensor | None,
        cached: bool,
    ) -> Tensor:
        T = q_RTHK.shape[1]
        masks = torch.ones(T, T, dtype=torch.bool, device=q_RTHK.device).tril(-1)
        masks[:, :1] = False
        masks = masks[None] if allowed_RTS is None else masks & allowed_RTS
        chosen = self.selection(q_RTHK, k_RSGK, masks)
        return self._biased(
            q_RTHK, k_RSGK, v_RSGV, allowed_RTS, causal, bias_RHTS, chosen.cumsum(1) - chosen
        )

    @staticmethod
    def _biased(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        allowed: Tensor | None,
        causal: bool,
        bias: Tensor | None,
        masked_RTS: Tensor,
    ) -> Tensor:
        F = -masked_RTS[:, None]
        F = F if bias is None else F + bias
        return attention(q, k, v, MaskSpec(allowed, causal), ScoreSpec(F))

    def _forward_cached(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx, state: SelectedKV
    ) -> tuple[Tensor, State]:
        (B, T), cache = q.shape[:2], state.kv
        docs = PackedRows.of(ctx.layout, cache.count.shape[0])
        f = docs.fields(ctx.layout.fields)
        q, k, v = docs.unpack(q), docs.unpack(k), docs.unpack(v)
        past_k, past_v, past_f = cache.past(docs, f)
        keys = torch.cat((past_k.transpose(1, 2).to(k.dtype), k), dim=1)
        values = torch.cat((past_v.transpose(1, 2).to(v.dtype), v), dim=1)
        known = paired(lambda old, new: torch.cat((old, new), dim=1), past_f, f)
        allowed = ctx.mask.dense(f, known)
        C, L = past_f.document.shape[1], q.shape[1]
        # Tokens of the call mask earlier ones of the call, and cached ones but the document's
        # first.
        number = torch.cat(
            (
                torch.arange(C, device=k.device).expand(q.shape[0], C),
                docs.read(cache.count)[:, None].long() + torch.arange(L, device=k.device),
            ),
            dim=1,
        )
        earlier = torch.ones(L, C + L, dtype=torch.bool, device=k.device).tril(C - 1)
        chosen = self.selection(q, keys.to(q.dtype), allowed & earlier & (number > 0)[:, None])
        before = docs.read(state.masked)
        masked = chosen.cumsum(1) - chosen
        masked = torch.cat((masked[..., :C] + before[:, None].to(masked), masked[..., C:]), dim=2)
        bias = self.position.score(q, f, known) if self.scored else None
        y = self._biased(
            q, keys.to(q.dtype), values.to(v.dtype), allowed, False, bias, masked
        )  # fmt: skip
        drafted = advance(cache, k, v, f, docs, True)
        assert isinstance(drafted, DraftKV)
        w = docs.written(cache.count.shape[0])
        past, own = w.take(chosen).to(state.masked.dtype).split((C, L), dim=2)
        after = DraftSelectedKV(drafted, state.masked, past, own)
        return docs.pack(y, B, T), after if ctx.draft else after.commit()

    def initial_state(self, n: int, max_len: int) -> SelectedKV:
        like = self._like().detach()
        wide = torch.promote_types(like.dtype, torch.float32)
        return SelectedKV(super().initial_state(n, max_len), like.new_zeros(n, max_len, dtype=wide))

    def state_bytes(self, n: int, max_len: int) -> int:
        return super().state_bytes(n, max_len) + n * max_len * max(self._like().element_size(), 4)


@MIXERS.register("selective_attention")
class SelectiveAttentionConfig(HeadsConfig):
    """Attention in which tokens mask earlier ones."""

    kind: Literal["selective_attention"] = "selective_attention"

    def build(self, d_model: int, linear: LinearFactory = dense) -> SelectiveAttention:
        heads, kv_heads, head_dim = self.sizes(d_model)
        return SelectiveAttention(
            d_model,
            heads,
            kv_heads,
            head_dim,
            self.placed(head_dim, d_model),
            linear,
        )

    @classmethod
    def smallest(cls) -> SelectiveAttentionConfig:
        return cls(heads=2, kv_heads=1)
