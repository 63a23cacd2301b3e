"""Softmax attention. B rows, T tokens, D model, H heads, G key heads, K head width, N slots, R rows
of one document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.kernels.attention import attention
from mm.layout import Fields
from mm.model.layer import Caps, Ctx, Linear, Mixer, Out, Position
from mm.model.linears.dense import DenseConfig
from mm.model.mixers.kv import KV, DraftKV, advance
from mm.model.norm import RMSNorm
from mm.model.rows import Docs, Groups, narrowed, paired
from mm.registry import MIXERS, POSITIONS
from mm.state import State


class Attention(Mixer):
    """Grouped-query attention over `Ctx.mask` and, if set, its own window.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); grouped heads: Ainslie et al. 2023
    (arXiv:2305.13245);
    QK-norm: Henry et al. 2020 (arXiv:2010.04245) with RMS norm; window: Beltagy et al. 2020
    (arXiv:2004.05150).
    """

    caps = Caps(causal=True, bidirectional=True, step=True, shard="ulysses")

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int | None,
        qk_norm: bool,
        position: Position,
        linear: Callable[..., Linear],
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.position = position
        # Positions that add to or multiply scores need the Fields of both sides: the dense path has
        # them.
        self.scored = (
            type(position).score is not Position.score or type(position).gain is not Position.gain
        )
        self.qkv = linear(d_model, (heads + 2 * kv_heads) * head_dim, "qkv")
        self.out = linear(heads * head_dim, d_model, "out")
        self.q_norm = RMSNorm(head_dim) if qk_norm else None
        self.k_norm = RMSNorm(head_dim) if qk_norm else None

    def _groups_key(self) -> str:
        return f"attention.groups.{self.window}"

    def shares(self, serving: bool) -> Mapping[str, Callable[[Ctx], Any]]:
        made: dict[str, Callable[[Ctx], Any]] = {}
        if self.position.key:
            made[self.position.key] = lambda ctx: self.position.prepare(ctx.layout.fields)
        if not serving and not self.scored:
            made[self._groups_key()] = lambda ctx: Groups.of(
                ctx.layout, narrowed(ctx.mask, self.window)
            )
        return made

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        H, G, K = self.heads, self.kv_heads, self.head_dim
        B, T = x_BTD.shape[:2]
        qkv = self.qkv(x_BTD, ctx).view(B, T, H + 2 * G, K)
        q, k, v = qkv.split((H, G, G), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        f = ctx.layout.fields
        prepared = ctx.shared.get(self.position.key)
        if prepared is None:
            q, k = self.position.rotate(q, k, f, f)
        else:
            q, k = self.position.apply(q, prepared), self.position.apply(k, prepared)
        if state is None:
            y, after = self._whole(q, k, v, ctx), None
        else:
            assert isinstance(state, KV | DraftKV)
            y, after = self._continued(q, k, v, ctx, state.settled())
        return Out(self.out(y.reshape(B, T, H * K), ctx), after)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx) -> Tensor:
        """Attention inside the call's documents."""
        B, T = q.shape[:2]
        groups = ctx.shared.get(self._groups_key())
        if groups is None:
            mask = narrowed(ctx.mask, self.window)
            # Grouping looks at values, which a graph cannot: a backbone shares it from outside the
            # graph.
            if self.scored or torch.compiler.is_compiling():
                f = ctx.layout.fields
                return attention(q, k, v, mask.dense(f, f), **self._scores(q, f, f))
            groups = Groups.of(ctx.layout, mask)
        done = []
        for group, (gq, gk, gv) in groups.split(q, k, v):
            done.append(attention(gq, gk, gv, group.allowed, causal=group.causal))
        return groups.join(done, B, T)

    def _continued(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx, state: KV
    ) -> tuple[Tensor, KV | DraftKV]:
        """Attention of each document to what its slot holds and to itself."""
        B, T = q.shape[:2]
        docs = Docs.of(ctx.layout, state.count.shape[0])
        mask = narrowed(ctx.mask, self.window)
        f = docs.fields(ctx.layout.fields)
        q, k, v = docs.unpack(q), docs.unpack(k), docs.unpack(v)
        if not ctx.draft and state.holds_call(docs, q.shape[1]):
            # Decoding's common case: store first, then attend to the cache where it lies, without
            # copying it.
            after = advance(state, k, v, f, docs, draft=False)
            assert isinstance(after, KV)
            keys, values, stored = after.seen()
        else:
            after = None
            past_k, past_v, past_f = state.past(docs, f)
            keys = torch.cat((past_k.transpose(1, 2).to(k.dtype), k), dim=1)
            values = torch.cat((past_v.transpose(1, 2).to(v.dtype), v), dim=1)
            stored = paired(lambda old, new: torch.cat((old, new), dim=1), past_f, f)
        scores = self._scores(q, f, stored) if self.scored else {}
        y = attention(q, keys.to(q.dtype), values.to(v.dtype), mask.dense(f, stored), **scores)
        return docs.pack(y, B, T), after if after is not None else advance(
            state, k, v, f, docs, ctx.draft
        )

    def _scores(self, q: Tensor, fq: Fields, fk: Fields) -> dict[str, Tensor | None]:
        return {
            "bias_RHTS": self.position.score(q, fq, fk),
            "gain_RHTS": self.position.gain(fq, fk),
        }

    def _places(self, max_len: int) -> int:
        return max_len if self.window is None else min(max_len, self.window)

    def initial_state(self, n: int, max_len: int) -> KV:
        like = next(self.parameters())
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        ring = self.window is not None and self.window < max_len
        return KV.empty(
            n,
            self.kv_heads,
            self._places(max_len),
            self.head_dim,
            self.head_dim,
            ring,
            like.detach(),
        )

    def state_bytes(self, n: int, max_len: int) -> int:
        item = next(self.parameters()).element_size()
        return KV.bytes(n, self.kv_heads, self._places(max_len), self.head_dim, self.head_dim, item)


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
    qk_norm: bool = True
    position: POSITIONS.field = Field(  # type: ignore[valid-type]
        default="rope", validate_default=True
    )

    def build(self, d_model: int, linear: Callable[..., Linear] | None = None) -> Attention:
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
            self.position.build(head_dim),
            linear or DenseConfig().build,
        )

    @classmethod
    def smallest(cls) -> AttentionConfig:
        return cls(heads=2, kv_heads=1)
