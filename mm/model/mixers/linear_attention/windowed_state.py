"""Linear attention whose state forgets exactly what left a window. B rows, T tokens, D model, H
heads, K key width, V value width, N slots, R rows of one document, L their length, P places of the
window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.kernels.linear_attention import linear_attention
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.mixers.linear_attention.linear_attention import (
    LinearAttention,
    LinearAttentionConfig,
    wrapped,
)
from mm.model.mixers.linear_attention.memory import Matrix, tail_of
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS, MixerField
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Windowed(DataclassState):
    """What the window sums up, its tokens, and the convolution's last inputs."""

    S: Tensor  # (N, H, K, V) float32 or wider
    k: Tensor  # (N, P, H, K)
    v: Tensor  # (N, P, H, V)
    g: Tensor  # (N, P, H)
    tail: Tensor  # (N, conv_size - 1, W)

    def accept(self, n_N: Tensor) -> Windowed:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> Windowed:
        return self


@dataclass(frozen=True)
class DraftWindowed(DataclassState):
    """What a draft call began from and was fed: accepting replays a prefix of it."""

    before: Windowed
    k: Tensor  # (N, L, H, K)
    v: Tensor  # (N, L, H, V)
    g: Tensor  # (N, L, H)
    inputs: Tensor  # (N, L, W) of the convolution
    length: Tensor  # (N,)

    def accept(self, n_N: Tensor) -> Windowed:
        n = torch.minimum(n_N.to(self.length), self.length)
        b, L = self.before, self.k.shape[1]
        k, v, g = (torch.cat(x, 1) for x in ((b.k, self.k), (b.v, self.v), (b.g, self.g)))
        S = summed(None, k, v, g, L, b.S, n)[1]
        k, v, g = (_last(t, b.k.shape[1], n) for t in (k, v, g))
        inputs = torch.cat((b.tail, self.inputs), 1)
        return Windowed(S, k, v, g, tail_of(inputs, b.tail.shape[1], n))

    def commit(self) -> Windowed:
        return self.accept(self.length)


def _last(x: Tensor, window: int, n: Tensor) -> Tensor:
    """The ``window`` places before place ``window + n`` of each row `(R, P + L, ...)`."""
    places = n[:, None] + torch.arange(window, device=n.device)
    return x[torch.arange(len(x), device=n.device)[:, None], places]


def summed(
    q: Tensor | None, k: Tensor, v: Tensor, g: Tensor, L: int, S: Tensor | None, n: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs `(R, L, H, V)` and the last state of ``S_t = a_t S_{t-1} + k_t v_t^T - (a_{t-P+1} ..
    a_t) k_{t-P} v_{t-P}^T``.

    Args:
        q: `(R, L, H, K)`; None = zeros.
        k: `(R, P + L, H, K)` with the window before the call; v, g alike.
        S: `(R, H, K, V)` before.
        n: `(R,)` tokens of each row that count; None = L.
    """
    P = k.shape[1] - L
    total = g.double().cumsum(1)
    # Of what left, what P steps of decay have made of it; a product of decays is not above 1.
    gone = -(total[:, P:] - total[:, :L]).clamp_max(0).exp().to(k)[..., None] * k[:, :L]
    new, old, now = (k[:, P:], v[:, P:]), (gone, v[:, :L]), g[:, P:]
    if n is not None:
        keep = torch.arange(L, device=k.device) < n[:, None]
        drop = lambda t: torch.where(keep.view(*keep.shape, *[1] * (t.dim() - 2)), t, 0)
        new, old, now = tuple(map(drop, new)), tuple(map(drop, old)), drop(now)
    q = q if q is not None else torch.zeros_like(new[0])
    o, after = linear_attention(q, *new, now, S)
    less, gone_after = linear_attention(q, *old, now)
    return o + less, after + gone_after


class WindowedState(Mixer):
    """``o_t = q_t (S_t - (a_{t-P+1} .. a_t) S_{t-P})``: the sum of the last P tokens, as if the
    recurrence had begun P tokens ago. The state cannot collapse on texts longer than training's.

    Wraps a `linear_attention` with decays by head, as Mamba-2 is.

    Source: Chen et al. 2024, Stuffed Mamba (arXiv:2410.07145), section on mitigations: sliding
    window by state difference.
    """

    caps = Caps(causal=True, step=True)

    def __init__(self, inner: LinearAttention, window: int):
        super().__init__()
        self.inner, self.window = inner, window

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        old = None
        if state is not None:
            assert isinstance(state, Windowed | DraftWindowed)
            old = state.commit()
        # The wrapped mixer reads the convolution's tail from a State of its own.
        f = self.inner.features(x_BTD, ctx, Matrix(old.S, old.tail) if old is not None else None)
        q, k, v, g = f["q"], f["k"], f["v"], f.get("g")
        g = (g if g is not None else q.new_zeros(())).expand(*q.shape[:3])
        if old is None:
            o, after = self._forward_full(q, k, v, g, ctx), None
        else:
            o, after = self._forward_cached(q, k, v, g, f.get("inputs"), ctx, old)
        return Out(self.inner.finish(o, x_BTD, f, ctx), after)

    def _forward_full(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, ctx: Ctx) -> Tensor:
        return per_document(self._fresh, ctx, q, k, v, g)

    def _fresh(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        before = (0, 0, 0, 0, self.window, 0)
        k, v, g = F.pad(k, before), F.pad(v, before), F.pad(g, before[2:])
        return summed(q, k, v, g, q.shape[1], None, None)[0]

    def _forward_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        inputs: Tensor | None,
        ctx: Ctx,
        state: Windowed,
    ) -> tuple[Tensor, Windowed | DraftWindowed]:
        """Outputs of documents that go on from their slots."""
        (B, T), N = q.shape[:2], state.S.shape[0]
        docs, P = PackedRows.of(ctx.layout, N), self.window
        rk, rv, rg = (docs.unpack(t) for t in (k, v, g))
        held = ((state.k, rk), (state.v, rv), (state.g, rg))
        ak, av, ag = (torch.cat((docs.read(h), t), 1) for h, t in held)
        before, L = docs.read(state.S), rk.shape[1]
        o, S = summed(docs.unpack(q), ak, av, ag, L, before, docs.length)
        y, w = docs.pack(o, B, T), docs.written(N)
        if inputs is None:
            inputs = state.tail.new_zeros(len(rk), L, 0)
        size = state.tail.shape[1]
        ends = torch.zeros_like(docs.length) if ctx.draft else docs.length
        at = Windowed(
            w.write(state.S, before if ctx.draft else S),
            w.write(state.k, _last(ak, P, ends)),
            w.write(state.v, _last(av, P, ends)),
            w.write(state.g, _last(ag, P, ends)),
            w.write(state.tail, tail_of(inputs, size, ends)),
        )
        if not ctx.draft:
            return y, at
        fed = w.take(inputs[:, size:]).to(state.tail.dtype)
        return y, DraftWindowed(at, w.take(rk), w.take(rv), w.take(rg), fed, w.length)

    def initial_state(self, n: int, max_len: int) -> Windowed:
        inner = self.inner.initial_state(n, max_len)
        _, H, K, V = inner.S.shape
        zero = lambda *shape: inner.S.new_zeros(n, self.window, *shape)
        return Windowed(inner.S, zero(H, K), zero(H, V), zero(H), inner.tail)

    def state_bytes(self, n: int, max_len: int) -> int:
        c = self.inner
        wide = max(next(c.parameters()).element_size(), 4)
        keys = c.initial_state(1, 1).S.shape[2]
        held = self.window * c.heads * (keys + c.value_dim + 1)
        return c.state_bytes(n, max_len) + n * held * wide


@MIXERS.register("windowed_state")
class WindowedStateConfig(Config):
    """Linear attention over the last ``window`` tokens, by the difference of two states."""

    kind: Literal["windowed_state"] = "windowed_state"
    inner: MixerField = Field(default="linear_attention", validate_default=True)
    window: Annotated[int, Field(gt=0, description="tokens; no more than training saw")] = 1024

    def build(self, d_model: int, linear: LinearFactory = dense) -> WindowedState:
        inner = wrapped(self.inner, "windowed_state")
        return WindowedState(inner.build(d_model, linear), self.window)

    @classmethod
    def smallest(cls) -> WindowedStateConfig:
        inner = LinearAttentionConfig(
            heads=2, feature="silu", normalise=False, decay="scalar", conv_size=3
        )
        return cls(inner=inner, window=3)
