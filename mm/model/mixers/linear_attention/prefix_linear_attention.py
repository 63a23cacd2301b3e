"""Linear attention that reads its prefix twice (JRT-RNN). B rows, T tokens, D model, H heads, K key
width, V value width, N slots, R rows of one document, L their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.errors import UserError
from mm.kernels.linear_attention import linear_attention
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out, zero_gradient_touch
from mm.model.linears.dense import dense
from mm.model.mixers.linear_attention.linear_attention import (
    EPS,
    LinearAttention,
    LinearAttentionConfig,
)
from mm.model.mixers.linear_attention.memory import DraftMatrix, Matrix
from mm.model.mixers.wrappers.reverse import both_ways, refuse_state
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS, MixerField
from mm.state import State


class PrefixLinearAttention(Mixer):
    """Linear attention whose prefix has keys and values of its own, k^e and v^e, which every token
    of the document reads; prefix tokens read all of the prefix, others only their past.

    The prefix is what the mask lets see both ways (`Prefix`, or all of a full mask) and comes whole
    in one call; without one this is the wrapped causal mixer.

    Source: Arora et al. 2024, Just read twice (arXiv:2407.05483), JRT-RNN: prefix
    linear attention.
    """

    caps = Caps(causal=True, bidirectional=True, step=True)

    def __init__(self, d_model: int, inner: LinearAttention, linear: LinearFactory):
        super().__init__()
        self.inner = inner
        self.sizes = (inner.key_heads * inner.key_dim, inner.heads * inner.value_dim)
        self.encoder = linear(d_model, sum(self.sizes), "encoder")

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        refuse_state("prefix_linear_attention", ctx, state)
        inside = both_ways(ctx)
        f = self.inner.features(x_BTD, ctx, state)
        if inside is None:
            o, after = self.inner.core(f, ctx, state)
            y = self.inner.finish(o, x_BTD, f, ctx)
            return Out(y + zero_gradient_touch(self.encoder.parameters(), y), after)
        q, k, v = f["q"], f["k"], f["v"]
        (B, T), c = q.shape[:2], self.inner
        ke, ve = self.encoder(x_BTD, ctx).to(v).split(self.sizes, -1)
        ke = c._spread(c._map(ke.view(B, T, c.key_heads, c.key_dim)))
        ve = ve.view(B, T, c.heads, c.value_dim)
        if c.config.normalise:
            v, ve = (torch.cat((t, torch.ones_like(t[..., :1])), -1) for t in (v, ve))
        parts = [q, k, v, ke, ve, inside[..., None].to(q)]
        if state is None:
            o, after = self._forward_full(parts, ctx), None
        else:
            assert isinstance(state, Matrix | DraftMatrix)
            o, after = self._forward_cached(parts, ctx, state.commit())
        if c.config.normalise:
            o = o[..., :-1] / (o[..., -1:] + EPS)
        return Out(self.inner.finish(o, x_BTD, f, ctx), after)

    def _forward_full(self, parts: list[Tensor], ctx: Ctx) -> Tensor:
        """Outputs of documents that all begin here."""

        def run(*rows: Tensor) -> Tensor:
            *rest, inside, t = rows
            # Rows are padded with copies of their last place, at its time: it counts once.
            moved = F.pad(t[:, 1:] != t[:, :-1], (0, 0, 1, 0), value=True)
            return self._rows([*rest, inside * moved])[0]

        return per_document(run, ctx, *parts, ctx.layout.fields.position[..., :1].to(parts[0]))

    @staticmethod
    def _valid(parts: list[Tensor], docs: PackedRows) -> list[Tensor]:
        """Rows of documents; a place that does not count neither writes nor is in the prefix."""
        return [
            torch.where(docs.valid.view(*docs.valid.shape, *[1] * (t.dim() - 2)), t, 0)
            for t in map(docs.unpack, parts)
        ]

    def _rows(
        self, parts: Sequence[Tensor], before: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs `(R, L, H, V)`, the last state and the first one, which holds the prefix's own
        keys and values. The last part `(R, L, 1)` is 1 in the prefix.
        """
        q, k, v, ke, ve, inside = parts
        share = inside[..., None]
        first = torch.einsum("rlhk,rlhv->rhkv", ke * share, ve)
        if before is not None:
            first = first + before
        o, last = linear_attention(q, k, v, None, first)
        prefix = first + torch.einsum("rlhk,rlhv->rhkv", k * share, v)
        return torch.where(share > 0, torch.einsum("rlhk,rhkv->rlhv", q, prefix), o), last, first

    def _forward_cached(
        self, parts: list[Tensor], ctx: Ctx, state: Matrix
    ) -> tuple[Tensor, Matrix | DraftMatrix]:
        """Outputs of documents that go on from their slots."""
        (B, T), N = parts[0].shape[:2], state.S.shape[0]
        docs = PackedRows.of(ctx.layout, N)
        rows = self._valid(parts, docs)
        o, S, first = self._rows(rows, docs.read(state.S))
        y, w = docs.pack(o, B, T), docs.written(N)
        if not ctx.draft:
            return y, Matrix(w.write(state.S, S), state.tail)
        # Drafts come after prefixes: the first state is what every accepted part begins from.
        none = state.tail.new_zeros(N, rows[0].shape[1], state.tail.shape[-1])
        k, v = w.take(rows[1]), w.take(rows[2])
        return y, DraftMatrix(w.write(state.S, first), k, v, None, none, w.length)

    def initial_state(self, n: int, max_len: int) -> Matrix:
        return self.inner.initial_state(n, max_len)

    def state_bytes(self, n: int, max_len: int) -> int:
        return self.inner.state_bytes(n, max_len)


@MIXERS.register("prefix_linear_attention")
class PrefixLinearAttentionConfig(Config):
    """Linear attention with an encoder's keys and values for the prefix."""

    kind: Literal["prefix_linear_attention"] = "prefix_linear_attention"
    inner: MixerField = Field(default="linear_attention", validate_default=True)

    def build(self, d_model: int, linear: LinearFactory = dense) -> PrefixLinearAttention:
        c = self.inner
        plain = isinstance(c, LinearAttentionConfig) and c.decay == "none" and not c.conv_size
        if not plain or c.position.kind != "none":
            raise UserError(
                "prefix_linear_attention wraps a linear_attention with decay: none, "
                "conv_size: 0 and position: none, e.g. the settings of based"
            )
        return PrefixLinearAttention(d_model, c.build(d_model, linear), linear)

    @classmethod
    def smallest(cls) -> PrefixLinearAttentionConfig:
        return cls(inner=MIXERS.get("linear_attention").smallest())
