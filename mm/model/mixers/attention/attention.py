"""Softmax attention. B rows, T tokens, D model, H heads, G key heads, K head width, N slots, R rows
of one document.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.layout import Fields
from mm.mask import Mask
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.length_buckets import LengthBuckets
from mm.model.linears.dense import dense
from mm.model.mixers.attention.base import TailedKV
from mm.model.mixers.attention.forget_gate import ForgetGate, ForgetKV, faded_from, forget_bias
from mm.model.mixers.attention.kv_cache import KV, DraftKV, advance
from mm.model.mixers.attention.token_shift import TokenShift
from mm.model.mixers.conv.state import DraftTail, Tail
from mm.model.norm import HeadNorm, RMSNorm
from mm.model.positions.base import Position
from mm.model.varlen import PackedRows, narrowed, paired
from mm.registry import MIXERS, PositionField
from mm.state import State


class Attention(Mixer):
    """Grouped-query attention over `Ctx.mask` and, if set, its own window.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); grouped heads: Ainslie et al. 2023
    (arXiv:2305.13245);
    QK-norm: Henry et al. 2020 (arXiv:2010.04245) with RMS norm; window: Beltagy et al. 2020
    (arXiv:2004.05150). Soft-cap: Gemma 2 (arXiv:2408.00118), section 2. Sinks: gpt-oss
    (arXiv:2508.10925), section 2. Scale by log n: Chiang & Cholak 2022 (arXiv:2202.12172), section
    5.3. Forget gate: `mm.model.mixers.attention.forget_gate`. Output gate: Qiu et al. 2025
    (arXiv:2505.06708).
    Output norm, norms by head, token shift: Lin et al. 2025 (arXiv:2503.02130), Pro block.
    """

    caps = Caps(causal=True, bidirectional=True, step=True, shard="ulysses")
    replays = False

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int | None,
        qk_norm: bool | Literal["heads"],
        position: Position,
        linear: LinearFactory,
        softcap: float | None = None,
        sinks: bool = False,
        log_n: float | None = None,
        forget: bool = False,
        gate: bool = False,
        out_norm: bool = False,
        shift: bool = False,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.position = position
        self.caps = replace(type(self).caps, length_general=position.length_general)
        self.softcap, self.log_n = softcap, log_n
        # Positions that add to or multiply scores need the Fields of both sides.
        self.scored = any(
            getattr(type(position), hook) is not getattr(Position, hook)
            for hook in ("score", "gain", "scores")
        )
        self.qkv = linear(d_model, (heads + 2 * kv_heads) * head_dim, "qkv")
        self.out = linear(heads * head_dim, d_model, "out")
        each: Callable[[int], nn.Module] = lambda n: (
            HeadNorm(n, head_dim) if qk_norm == "heads" else RMSNorm(head_dim)
        )
        self.q_norm = each(heads) if qk_norm else None
        self.k_norm = each(kv_heads) if qk_norm else None
        self.out_norm = HeadNorm(heads, head_dim) if out_norm else None
        self.shift = TokenShift(d_model, kv_heads, linear) if shift else None
        self.sink = nn.Parameter(torch.empty(heads)) if sinks else None
        self.forget = ForgetGate(d_model, heads, linear) if forget else None
        self.gate = linear(d_model, heads * head_dim, "gate") if gate else None

    def init_weights(self) -> None:
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def prefetch(self, ctx: Ctx, serving: bool) -> None:
        if not serving:
            self._groups(ctx)
            if self.position.key:
                self.position.prepare_call(ctx, self._placed(ctx, serving))

    def _groups(self, ctx: Ctx) -> LengthBuckets | None:
        """The call's documents by length, with what the mask is within each group."""
        window = self.window
        return ctx.cached_on_host(
            f"attention.groups.{window}",
            lambda layout, mask: LengthBuckets.of(layout, narrowed(mask, window), by_vectors=True),
        )

    def _mask(self, ctx: Ctx) -> Mask:
        """Who sees whom in this layer."""
        return narrowed(ctx.mask, self.window)

    def _projected(
        self, x_BTD: Tensor, ctx: Ctx, tail: State | None, serving: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, State | None]:
        """Queries `(B, T, H, K)`, keys and values `(B, T, G, K)` with their positions, log forget
        gates, and the tail that a token shift leaves.
        """
        H, G, K = self.heads, self.kv_heads, self.head_dim
        B, T = x_BTD.shape[:2]
        f = self._placed(ctx, serving)
        x_BTD = self.position.embed(x_BTD, f)
        qkv = self.qkv(x_BTD, ctx).view(B, T, H + 2 * G, K)
        if self.shift is not None:
            q, kv = qkv.split((H, 2 * G), dim=2)
            kv, tail = self.shift(x_BTD, kv, ctx, tail)
            k, v = kv.split(G, dim=2)
        else:
            q, k, v = qkv.split((H, G, G), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.position.rotate_call(ctx, q, k, f)
        if self.log_n is not None:
            q = self._stretched(q, ctx.layout.fields)
        kept = self.forget(x_BTD, ctx) if self.forget is not None else None
        return q, k, v, kept, tail

    def weights(self, x_BTD: Tensor, ctx: Ctx) -> Tensor:
        """Attention weights `(B, T, H, T)` of whole documents, to look at: O(T^2) memory."""
        B, T = x_BTD.shape[:2]
        q, k, _, kept, _ = self._projected(x_BTD, ctx, None, False)
        one = torch.eye(T, dtype=q.dtype, device=q.device)[None, :, None]
        return self._forward_full(q, k, one.expand(B, T, self.kv_heads, T), kept, ctx)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        H, K = self.heads, self.head_dim
        B, T = x_BTD.shape[:2]
        past, tail = (state.commit() if state is not None else None), None  # type: ignore[attr-defined]
        if isinstance(past, TailedKV):
            past, tail = past.kv, past.tail
        q, k, v, kept, tail = self._projected(x_BTD, ctx, tail, state is not None)
        after: State | None = None
        if past is None:
            y = self._forward_full(q, k, v, kept, ctx)
        else:
            assert isinstance(past, KV | ForgetKV)
            y, after = self._forward_cached(q, k, v, kept, ctx, past)
            if self.shift is not None:
                assert isinstance(tail, Tail | DraftTail)
                after = TailedKV(after, tail)
        if self.out_norm is not None:
            y = self.out_norm(y)
        y = y.reshape(B, T, H * K)
        if self.gate is not None:
            x_BTD = self.position.embed(x_BTD, self._placed(ctx, state is not None))
            y = y * self.gate(x_BTD, ctx).sigmoid().to(y.dtype)
        return Out(self.out(y, ctx), after)

    def _placed(self, ctx: Ctx, serving: bool) -> Fields:
        """Fields with the ids that the position gives places in training; masks go by the true
        ones.
        """
        f = ctx.layout.fields
        if serving or not self.training:
            return f
        return f._replace(position=self.position.ids(f, ctx))

    def _stretched(self, q: Tensor, f: Fields) -> Tensor:
        """Queries times ``log n / log log_n``; n = how many tokens there are up to the query."""
        assert self.log_n is not None
        n = f.position[..., 0] + 1
        n = n if self.window is None else n.clamp_max(self.window)
        wide = torch.promote_types(q.dtype, torch.float32)
        return (q * (n.to(wide).log() / math.log(self.log_n))[:, :, None, None]).to(q.dtype)

    def _forward_full(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, ctx: Ctx
    ) -> Tensor:
        """Attention inside the call's documents."""
        B, T = q.shape[:2]
        f = self._placed(ctx, False) if self.scored else ctx.layout.fields
        groups = self._groups(ctx)
        if groups is None:
            mask = self._mask(ctx)
            faded = kept.cumsum(1) if kept is not None else None
            scores = self._scores(q, f, f, faded, faded)
            true = ctx.layout.fields
            return attention(q, k, v, MaskSpec(mask.dense(true, true)), scores)
        parts = [q, k, v]
        if kept is not None:
            parts.append(kept)
        if self.scored:
            parts += [f.position, f.document, f.modality, *f.extra.values()]
        done = []
        for group, (gq, gk, gv, *rest) in groups.split(*parts):
            faded = rest.pop(0).cumsum(1) if kept is not None else None
            gf = f
            if rest:
                position, document, modality, *extra = rest
                gf = Fields(position, document, modality, dict(zip(f.extra, extra, strict=True)))
            scores = self._scores(gq, gf, gf, faded, faded)
            assert group.mask is not None
            done.append(attention(gq, gk, gv, group.mask, scores))
        return groups.join(done, B, T)

    def _forward_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Tensor | None,
        ctx: Ctx,
        state: KV | ForgetKV,
    ) -> tuple[Tensor, State]:
        """Attention of each document to what its slot holds and to itself."""
        B, T = q.shape[:2]
        cache, gates = (state.kv, state.gate) if isinstance(state, ForgetKV) else (state, None)
        assert isinstance(cache, KV) and not isinstance(gates, DraftKV)
        docs = PackedRows.of(ctx.layout, cache.count.shape[0])
        mask = self._mask(ctx)
        f = docs.fields(ctx.layout.fields)
        q, k, v = docs.unpack(q), docs.unpack(k), docs.unpack(v)
        parts = [(cache, k, v)]
        faded = None
        if gates is not None:
            assert kept is not None
            faded = faded_from(gates, docs.unpack(kept), docs)
            parts.append((gates, faded[..., None], faded.new_empty(*faded.shape, 0)))
        in_place = not ctx.draft and cache.holds_call(docs, q.shape[1])
        after = [advance(s, a, b, f, docs, ctx.draft) for s, a, b in parts] if in_place else []
        seen = []
        for i, (part, a, b) in enumerate(parts):
            if in_place:
                # Decoding's common case: stored first, then attended to where it lies, without
                # copying the cache.
                stored = after[i]
                assert isinstance(stored, KV)
                seen.append(stored.seen())
                continue
            past_a, past_b, past_f = part.past(docs, f)
            seen.append(
                (
                    torch.cat((past_a.transpose(1, 2).to(a.dtype), a), dim=1),
                    torch.cat((past_b.transpose(1, 2).to(b.dtype), b), dim=1),
                    paired(lambda old, new: torch.cat((old, new), dim=1), past_f, f),
                )
            )
        keys, values, known = seen[0]
        scores = self._scores(q, f, known, faded, seen[1][0][..., 0] if gates is not None else None)
        seen_by = MaskSpec(mask.dense(f, known))
        y = attention(q, keys.to(q.dtype), values.to(v.dtype), seen_by, scores)
        if not in_place:
            after = [advance(s, a, b, f, docs, ctx.draft) for s, a, b in parts]
        return docs.pack(y, B, T), after[0] if gates is None else ForgetKV(*after)

    def _scores(
        self, q: Tensor, fq: Fields, fk: Fields, faded_q: Tensor | None, faded_k: Tensor | None
    ) -> ScoreSpec:
        """What changes the scores: position, forget gates, soft-cap and sinks."""
        score = self.position.scores(q, fq, fk) if self.scored else ScoreSpec()
        if faded_q is not None and faded_k is not None:
            if score.fade_RTH is not None:  # two distances do not add up to one
                bias, other = forget_bias(faded_q, faded_k), score.bias_RHTS
                score = score._replace(bias_RHTS=bias if other is None else bias + other)
            else:
                score = score._replace(fade_RTH=faded_q, fade_RSH=faded_k)
        return score._replace(softcap=self.softcap, sink_H=self.sink)

    @property
    def reach(self) -> int | None:
        """How many tokens back a query may see: bounds the cache; None = all."""
        return self.window

    def _places(self, max_len: int) -> int:
        return max_len if self.reach is None else min(max_len, self.reach)

    def initial_state(self, n: int, max_len: int) -> KV | ForgetKV | TailedKV:
        like = self._like()
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        ring = self.reach is not None and self.reach < max_len
        C, like = self._places(max_len), like.detach()
        kv: Any = KV.empty(n, self.kv_heads, C, self.head_dim, self.head_dim, ring, like)
        if self.forget is not None:
            wide = torch.promote_types(like.dtype, torch.float32)
            kv = ForgetKV(kv, KV.empty(n, self.heads, C, 1, 0, ring, like.to(wide)))
        if self.shift is not None:
            kv = TailedKV(kv, Tail(like.new_zeros(n, 1, 2 * self.kv_heads * self.head_dim)))
        return kv

    def state_bytes(self, n: int, max_len: int) -> int:
        item, C = self._like().element_size(), self._places(max_len)
        kept = KV.bytes(n, self.heads, C, 1, 0, max(item, 4)) if self.forget is not None else 0
        if self.shift is not None:
            kept += n * 2 * self.kv_heads * self.head_dim * item
        return kept + KV.bytes(n, self.kv_heads, C, self.head_dim, self.head_dim, item)

    def _like(self) -> Tensor:
        return next(self.parameters())


@MIXERS.register("attention")
class AttentionConfig(Config):
    """Grouped-query attention with a position plug, optional QK-norm and optional own window."""

    kind: Literal["attention"] = "attention"
    heads: Annotated[int, Field(gt=0)] = 4
    kv_heads: (
        Annotated[int, Field(gt=0, description="key heads; default: as many as heads")] | None
    ) = None
    head_dim: Annotated[int, Field(gt=0, description="default: d_model / heads")] | None = None
    window: (
        Annotated[int, Field(gt=0, description="tokens a query sees, itself included")] | None
    ) = None
    qk_norm: Annotated[
        bool | Literal["heads"], Field(description="heads: with scales of each head's own")
    ] = True
    softcap: Annotated[float, Field(gt=0, description="bound of the logits")] | None = None
    sinks: Annotated[bool, Field(description="a learned logit a head that attends to nothing")] = (
        False
    )
    log_n: (
        Annotated[float, Field(gt=1, description="length at which scaling by log n is 1")] | None
    ) = None
    forget_gate: Annotated[bool, Field(description="FoX: what lies behind closed gates fades")] = (
        False
    )
    gate: Annotated[bool, Field(description="sigmoid gate before the output projection")] = False
    out_norm: Annotated[bool, Field(description="RMSNorm of each head's output")] = False
    token_shift: Annotated[
        bool, Field(description="keys and values take a gated share of the previous token's")
    ] = False
    position: PositionField = Field(default="rope", validate_default=True)

    def build(self, d_model: int, linear: LinearFactory = dense) -> Attention:
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {kv_heads}")
        if self.head_dim is None and d_model % self.heads:
            raise ValueError(
                f"d_model {d_model} is not a multiple of heads {self.heads}; set head_dim"
            )
        head_dim = self.head_dim or d_model // self.heads
        return Attention(
            d_model,
            self.heads,
            kv_heads,
            head_dim,
            self.window,
            self.qk_norm,
            self.position.build(head_dim, heads=self.heads, d_model=d_model),
            linear,
            self.softcap,
            self.sinks,
            self.log_n,
            self.forget_gate,
            self.gate,
            self.out_norm,
            self.token_shift,
        )

    @classmethod
    def smallest(cls) -> AttentionConfig:
        return cls(heads=2, kv_heads=1)
