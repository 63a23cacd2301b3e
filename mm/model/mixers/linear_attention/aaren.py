"""Attention as a recurrence. B rows, T tokens, D model, H heads, V value width, N slots, R rows of
one document, L their length.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.linear_scan import linear_scan
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.mixers.ssm.scan import Hidden, advanced, commit
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS
from mm.state import State


class Aaren(Mixer):
    """Causal softmax attention of ONE learned query a head: ``o_t = sum_{i <= t} e^{s_i} v_i / sum
    e^{s_i}`` with ``s_i = q . k_i``.

    The state is the largest score so far m, and the weights' and values' sums in units of ``e^m``;
    both are first-order recurrences with decay ``e^{m_{t-1} - m_t}``, whose exponents are <= 0.

    Source: Feng et al. 2024 (arXiv:2405.13956), sections 3.1-3.3 and figure 4.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, heads: int, linear: LinearFactory):
        super().__init__()
        self.heads, self.width = heads, d_model // heads
        self.kv = linear(d_model, 2 * d_model, "kv")
        self.query = nn.Parameter(torch.empty(heads, self.width))
        self.out = linear(d_model, d_model, "out")

    def init_weights(self) -> None:
        nn.init.normal_(self.query)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        (B, T), H, V = x_BTD.shape[:2], self.heads, self.width
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        k, v = self.kv(x_BTD, ctx).to(wide).chunk(2, -1)
        score = torch.einsum("bthv,hv->bth", k.unflatten(-1, (H, V)), self.query.to(wide))
        score = score * V**-0.5
        if state is None:
            o, after = self._forward_full(score, v, ctx), None
        else:
            old = commit(state)
            docs = PackedRows.of(ctx.layout, old.h.shape[0])
            before = docs.read(old.h, self._fresh(old.h))
            o, h = self._scanned(docs.unpack(score), docs.unpack(v), before)
            o, after = docs.pack(o, B, T), advanced(old, docs, before, h, ctx.draft)
        return Out(self.out(o.to(x_BTD.dtype), ctx), after)

    def _forward_full(self, score: Tensor, v: Tensor, ctx: Ctx) -> Tensor:
        return per_document(lambda *x: self._scanned(*x)[0], ctx, score, v)

    def _fresh(self, like: Tensor) -> Tensor:
        """State before the first token: no score at all, and nothing summed up."""
        fresh = like.new_zeros(self._size())
        fresh[: self.heads] = -torch.inf
        return fresh

    def _scanned(
        self, score: Tensor, v: Tensor, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs `(R, L, D)` and states `(R, L, H + H + D)` of rows of one document."""
        R, H = score.shape[0], self.heads
        if before is None:
            before = self._fresh(score).expand(R, -1)
        # Outputs do not depend on the unit m: no gradient goes through it.
        first, top = before[:, None, :H].detach(), score.detach()
        m = torch.cat((first, top), 1).cummax(1)[0]
        keep = torch.where(m[:, :-1] == m[:, 1:], 0.0, m[:, :-1] - m[:, 1:]).exp()
        weight = (score - m[:, 1:]).exp()
        spread = lambda t: t.repeat_interleave(self.width, -1)
        summed, _ = linear_scan(
            torch.cat((keep, spread(keep)), -1),
            torch.cat((weight, spread(weight) * v), -1),
            None,
            before[:, H:].contiguous(),
        )
        return summed[..., H:] / spread(summed[..., :H]), torch.cat((m[:, 1:], summed), -1)

    def _size(self) -> int:
        return self.heads * (2 + self.width)

    def initial_state(self, n: int, max_len: int) -> Hidden:
        like = self.query.detach()
        wide = torch.promote_types(like.dtype, torch.float32)
        return Hidden(self._fresh(like.to(wide)).repeat(n, 1))

    def state_bytes(self, n: int, max_len: int) -> int:
        return n * self._size() * max(self.query.element_size(), 4)


@MIXERS.register("aaren")
class AarenConfig(Config):
    """Softmax attention of a learned query, with a state of constant size."""

    kind: Literal["aaren"] = "aaren"
    heads: Annotated[int, Field(gt=0)] = 4

    def build(self, d_model: int, linear: LinearFactory = dense) -> Aaren:
        if d_model % self.heads:
            raise ValueError(f"aaren: {self.heads} heads do not divide d_model {d_model}")
        return Aaren(d_model, self.heads, linear)

    @classmethod
    def smallest(cls) -> AarenConfig:
        return cls(heads=2)
