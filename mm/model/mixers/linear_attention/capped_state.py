"""Linear attention whose state is kept from growing. B rows, T tokens, D model, H heads, K key
width, V value width, N slots, R rows of one document, L their length, C places of a chunk, W width
of what is convolved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.errors import UserError
from mm.kernels.linear_attention import linear_attention
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.mixers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from mm.model.mixers.linear_attention.memory import Matrix, tail_of
from mm.model.varlen import PackedRows, per_document, pieces
from mm.registry import MIXERS, MixerField
from mm.state import DataclassState, State

CHUNK = 64


@dataclass(frozen=True)
class DraftCapped(DataclassState):
    """What a draft call began from and was fed: accepting replays a prefix of it."""

    S: Tensor  # (N, H, K, V)
    k: Tensor  # (N, L, H, K)
    v: Tensor  # (N, L, H, V)
    g: Tensor  # (N, L, H)
    inputs: Tensor  # (N, conv_size - 1 + L, W)
    length: Tensor  # (N,)
    cap: float

    def accept(self, n_N: Tensor) -> Matrix:
        n = torch.minimum(n_N.to(self.length), self.length)
        S = capped(None, self.k, self.v, self.g, self.S, n, self.cap)[1]
        return Matrix(S, tail_of(self.inputs, self.inputs.shape[1] - self.k.shape[1], n))

    def commit(self) -> Matrix:
        return self.accept(self.length)


def shrinkage(
    k: Tensor, v: Tensor, g: Tensor, S: Tensor, real: Tensor | None, cap: float
) -> Tensor:
    """`(R, C, H)` factor in (0, 1] by which each place of a chunk shrinks the state after it.

    A factor a head makes the state a weighted sum of ``k_s v_s^T`` and of ``S``, whose norm needs
    their scalar products alone: the loop over places carries weights, not matrices.

    Args:
        k: `(R, C, H, K)`; v: `(R, C, H, V)`; g: `(R, C, H)` log decays.
        S: `(R, H, K, V)` state before the chunk.
        real: `(R, C)` bool, places that count; None = all.
    """
    like = torch.einsum("rlhk,rmhk->rlmh", k, k) * torch.einsum("rlhv,rmhv->rlmh", v, v)
    old = torch.einsum("rlhk,rhkv,rlhv->rlh", k, S, v)
    square = S.square().sum((-1, -2))
    weights = torch.ones_like(square)[:, None]  # (R, 1 + t, H): of S, then of places before t
    factors = []
    # A column of scalar products: with S first, then with each place.
    columns = torch.cat((old[:, None], like), 1).unbind(2)
    for t, (a, column) in enumerate(zip(g.exp().unbind(1), columns, strict=True)):
        across = (weights * column[:, : 1 + t]).sum(1)
        grown = a * a * square + 2 * a * across + column[:, 1 + t]
        factor = cap * grown.clamp_min(cap * cap).rsqrt()
        if real is not None:
            factor = torch.where(real[:, t, None], factor, 1.0)
        square = grown * factor.square()
        weights = torch.cat((weights * (a * factor)[:, None], factor[:, None]), 1)
        factors.append(factor)
    return torch.stack(factors, 1)


def capped(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    S: Tensor | None,
    length: Tensor | None,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """Outputs `(R, L, H, V)` and the last state of ``S_t = s_t (a_t S_{t-1} + k_t v_t^T)``, where
    ``s_t <= 1`` keeps the Frobenius norm of ``S_t`` within ``cap``.

    Args:
        q: `(R, L, H, K)`; None = zeros; k, v, g as in `shrinkage`.
        S: `(R, H, K, V)` before; None = zeros.
        length: `(R,)` places of each row that count; None = all.
    """
    (R, L, H, K), V = k.shape, v.shape[-1]
    q = torch.zeros_like(k) if q is None else q
    before = k.new_zeros(R, H, K, V) if S is None else S
    real = None
    if length is not None:
        real = torch.arange(L, device=k.device) < length[:, None]
        drop = lambda t: t.masked_fill(~real.view(R, L, *[1] * (t.dim() - 2)), 0)
        k, v, g = drop(k), drop(v), drop(g)
    done = []
    for qc, kc, vc, gc, counts in pieces(CHUNK, q, k, v, g, real):
        factor = shrinkage(kc, vc, gc, before, counts, cap)
        decayed, written = gc + factor.log(), vc * factor[..., None]
        o, before = linear_attention(qc, kc, written, decayed, before)
        done.append(o)
    return torch.cat(done, 1) if done else torch.zeros_like(v), before


class CappedState(Mixer):
    """``S_t = S'_t min(1, c / |S'_t|)`` by head, ``S'_t = a_t S_{t-1} + k_t v_t^T``: the state of a
    text of any length is no larger than those that training saw.

    Wraps a `linear_attention` with decays by head, as Mamba-2 is. A token's factor needs the state
    before it, so tokens wait for each other; all but their scalar factors is computed in chunks.

    Source: Chen et al. 2024, Stuffed Mamba (arXiv:2410.07145v1), its mitigation by state
    normalisation.
    """

    caps = Caps(causal=True, step=True, sequential=True)

    def __init__(self, inner: LinearAttention, cap: float):
        super().__init__()
        self.inner, self.cap = inner, cap

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        old = None
        if state is not None:
            assert isinstance(state, Matrix | DraftCapped)
            old = state.commit()
        f = self.inner.features(x_BTD, ctx, old)
        q, k, v, g = f["q"], f["k"], f["v"], f.get("g")
        g = (g if g is not None else q.new_zeros(())).expand(*q.shape[:3])
        if old is None:
            o, after = per_document(self._fresh, ctx, q, k, v, g), None
        else:
            o, after = self._forward_cached(q, k, v, g, f.get("inputs"), ctx, old)
        return Out(self.inner.finish(o, x_BTD, f, ctx), after)

    def _fresh(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return capped(q, k, v, g, None, None, self.cap)[0]

    def _forward_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        inputs: Tensor | None,
        ctx: Ctx,
        state: Matrix,
    ) -> tuple[Tensor, Matrix | DraftCapped]:
        """Outputs of documents that go on from their slots."""
        (B, T), N = q.shape[:2], state.S.shape[0]
        docs = PackedRows.of(ctx.layout, N)
        rq, rk, rv, rg = (docs.unpack(t) for t in (q, k, v, g))
        before = docs.read(state.S)
        o, S = capped(rq, rk, rv, rg, before, docs.length, self.cap)
        y, w = docs.pack(o, B, T), docs.written(N)
        if inputs is None:
            inputs = state.tail.new_zeros(rq.shape[0], rq.shape[1], 0)
        size = state.tail.shape[1]
        if not ctx.draft:
            tail = tail_of(inputs, size, docs.length)
            return y, Matrix(w.write(state.S, S), w.write(state.tail, tail))
        taken = w.take(inputs).to(state.tail.dtype)
        first = torch.where(w.hit[:, None, None], taken[:, :size], state.tail)
        return y, DraftCapped(
            w.write(state.S, before),
            w.take(rk),
            w.take(rv),
            w.take(rg),
            torch.cat((first, taken[:, size:]), dim=1),
            w.length,
            self.cap,
        )

    def initial_state(self, n: int, max_len: int) -> Matrix:
        return self.inner.initial_state(n, max_len)

    def state_bytes(self, n: int, max_len: int) -> int:
        return self.inner.state_bytes(n, max_len)


@MIXERS.register("capped_state")
class CappedStateConfig(Config):
    """Linear attention whose state has a bounded norm."""

    kind: Literal["capped_state"] = "capped_state"
    inner: MixerField = Field(default="linear_attention", validate_default=True)
    cap: Annotated[
        float, Field(gt=0, description="Frobenius norm of a head's state; the largest in training")
    ] = 10.0

    def build(self, d_model: int, linear: LinearFactory = dense) -> CappedState:
        c = self.inner
        if not isinstance(c, LinearAttentionConfig) or c.normalise or c.decay == "channel":
            raise UserError(
                "capped_state wraps a linear_attention with normalise: false and decays by head "
                "(decay: none, constant, scalar or step), e.g. the settings of mamba2"
            )
        return CappedState(c.build(d_model, linear), self.cap)

    @classmethod
    def smallest(cls) -> CappedStateConfig:
        inner = LinearAttentionConfig(
            heads=2, feature="silu", normalise=False, decay="scalar", conv_size=3
        )
        return cls(inner=inner, cap=0.5)
