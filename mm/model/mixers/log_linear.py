"""Log-linear attention: a linear mixer with one matrix state for each scale of its past.

B rows, T tokens, D model, H heads, K key width, V value width, E levels, N slots, R rows of one
document, L their length, C places of a chunk, W width of what is convolved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.layer import Caps, Ctx, Linear, Mixer, Out
from mm.model.linears.dense import DenseConfig
from mm.model.mixers.linear_attention import (
    LinearAttention,
    LinearAttentionConfig,
    Matrix,
    tail_of,
    wrapped,
)
from mm.model.rows import Docs, by_document
from mm.registry import MIXERS
from mm.state import State, Struct

CHUNK = 64


def level(reader: Tensor, read: Tensor, levels: int) -> Tensor:
    """Which bucket of the reader's past a place is in: 0 its own, then the highest bit in which
    the places differ, from 1; the last level keeps all that is further away.

    Buckets are those of a Fenwick tree: powers of two of places, the smaller the nearer.

    Args:
        reader: `(...)` int64 places.
        read: `(...)` int64 places, not later.
    """
    gap = torch.bitwise_xor(reader, read)
    bits = torch.arange(levels - 1, device=gap.device)
    return (gap[..., None] >> bits > 0).sum(-1)


@dataclass(frozen=True)
class Fenwick(Struct):
    """A matrix for each level and head, and the convolution's last inputs."""

    S: Tensor  # (N, E, H, K, V) float32 or wider
    place: Tensor  # (N,) int64 tokens so far
    tail: Tensor  # (N, taps - 1, W)

    def accept(self, n_N: Tensor) -> Fenwick:
        raise ValueError("accept() takes the State of a call with draft=True")

    def settled(self) -> Fenwick:
        return self


@dataclass(frozen=True)
class DraftFenwick(Struct):
    """What a draft call began from and was fed: accepting replays a prefix of it."""

    S: Tensor  # (N, E, H, K, V)
    place: Tensor  # (N,)
    k: Tensor  # (N, L, H, K)
    v: Tensor  # (N, L, H, V)
    g: Tensor  # (N, L, H)
    inputs: Tensor  # (N, taps - 1 + L, W)
    length: Tensor  # (N,)

    def accept(self, n_N: Tensor) -> Fenwick:
        n = torch.minimum(n_N.to(self.length), self.length)
        S = advance(self.S, self.place, self.k, self.v, self.g, n)
        tail = tail_of(self.inputs, self.inputs.shape[1] - self.k.shape[1], n)
        return Fenwick(S, self.place + n, tail)

    def settled(self) -> Fenwick:
        return self.accept(self.length)


def bucket_level(reader: Tensor, place: Tensor, levels: int) -> Tensor:
    """`(..., E)` which bucket of a later ``reader`` `(...)` holds each bucket of the one at
    ``place`` - 1 `(...)`; a bucket is never divided. Empty ones may go anywhere.
    """
    last = (place - 1).clamp_min(0)[..., None]
    bits = torch.arange(1, levels - 1, device=place.device)
    # The bucket of level e differs in bit e - 1, where ``last`` has a one, and agrees above it:
    # one of its places is ``last`` without the e lowest bits.
    inside = torch.cat((last, last >> bits << bits), -1)
    found = level(reader[..., None], inside, levels)
    # What is in the last level stays there.
    return F.pad(found, (0, 1), value=levels - 1)


def advance(S: Tensor, place: Tensor, k: Tensor, v: Tensor, g: Tensor, length: Tensor) -> Tensor:
    """Buckets after ``length`` more tokens: each old bucket and token goes where the last token's
    reader has it.

    Args:
        S: `(R, E, H, K, V)` buckets of a reader at ``place`` - 1.
        place: `(R,)` tokens before.
        k: `(R, L, H, K)`; v: `(R, L, H, V)`; g: `(R, L, H)` log decays.
        length: `(R,)`; 0 leaves a row's buckets alone.
    """
    E, L = S.shape[1], k.shape[1]
    if L == 0:
        return S
    steps = torch.arange(L, device=k.device)
    real = steps < length[:, None]
    log = torch.where(real[..., None], g, 0).double().cumsum(1)
    total = log[:, -1]
    end = place + length - 1
    moved = bucket_level(end, place, E)
    into = F.one_hot(moved, E).to(S)  # (R, E old, E new)
    # An empty reader's past (no token yet) is zeros: it may go anywhere.
    kept = torch.einsum("refh,rehkv->rfhkv", into[..., None] * total.exp().to(S)[:, None, None], S)
    to = F.one_hot(level(end[:, None], (place[:, None] + steps).clamp_max(end[:, None]), E), E)
    weight = torch.where(real[..., None], (total[:, None] - log).exp().to(S), 0)
    added = torch.einsum("rle,rlhk,rlhv->rehkv", to.to(S), k * weight[..., None], v)
    return torch.where((length > 0).view(-1, 1, 1, 1, 1), kept + added, S)


def read(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, gain: Tensor, S: Tensor, place: Tensor
) -> Tensor:
    """Outputs `(R, L, H, V)` of a chunk: masked scores inside it, buckets before it.

    Args:
        q: `(R, L, H, K)`; k, v, g as in `advance`.
        gain: `(R, L, H, E)` how much each reader makes of each level.
        S: `(R, E, H, K, V)` buckets before; place: `(R,)` tokens before.
    """
    L, E = q.shape[1], gain.shape[-1]
    at = place[:, None] + torch.arange(L, device=q.device)
    log = g.double().cumsum(1).transpose(1, 2)  # (R, H, L)
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    between = (log[..., None] - log[..., None, :]).masked_fill(future, -torch.inf).exp().to(q)
    levels = level(at[:, :, None], torch.minimum(at[:, None], at[:, :, None]), E)  # (R, L, L)
    share = gain.transpose(1, 2).gather(3, levels[:, None].expand(-1, gain.shape[2], -1, -1))
    scores = torch.einsum("rlhk,rmhk->rhlm", q, k) * between * share
    inside = torch.einsum("rhlm,rmhv->rlhv", scores, v)
    # An old bucket is inside one bucket of every later reader.
    old = bucket_level(at, place[:, None].expand_as(at), E)  # (R, L, E)
    share = gain.gather(3, old[:, :, None].expand(-1, -1, gain.shape[2], -1))
    share = share * log.transpose(1, 2)[..., None].exp().to(q)
    return inside + torch.einsum("rlhk,rlhe,rehkv->rlhv", q, share, S)


class LogLinear(Mixer):
    """``o_t = sum_e l_t^e S_t^e q_t``: state e sums keys and values of the e-th bucket of the past,
    and each token weighs the levels as it likes.

    Wraps a `linear_attention` whose decays are by head: Mamba-2, RetNet, simple GLA and their like.
    With all weights 1 it is that mixer. Training costs O(T log T), a state has E matrices.

    Source: Guo et al. 2025, Log-linear attention (arXiv:2506.04761), sections 3.1-3.3.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(
        self, d_model: int, inner: LinearAttention, levels: int, linear: Callable[..., Linear]
    ):
        super().__init__()
        self.inner, self.levels = inner, levels
        self.gain = linear(d_model, inner.heads * levels, "gain")
        self.gain_bias = nn.Parameter(torch.empty(inner.heads * levels))

    def init_weights(self) -> None:
        nn.init.constant_(self.gain_bias, 0.5413)  # softplus: levels begin with weight 1

    def shares(self, serving: bool) -> Mapping[str, Callable[[Ctx], Any]]:
        return self.inner.shares(serving)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        B, T = x_BTD.shape[:2]
        old = None
        if state is not None:
            assert isinstance(state, Fenwick | DraftFenwick)
            old = state.settled()
        # The wrapped mixer reads the convolution's tail from a State of its own.
        f = self.inner.features(x_BTD, ctx, Matrix(old.S, old.tail) if old is not None else None)
        q, k, v = f["q"], f["k"], f["v"]
        g = f.get("g")
        g = (g if g is not None else q.new_zeros(())).expand(B, T, self.inner.heads)
        raw = self.gain(x_BTD, ctx).to(q) + self.gain_bias.to(q)
        gain = F.softplus(raw).view(B, T, -1, self.levels)
        if old is None:
            o, after = self._whole(q, k, v, g, gain, ctx), None
        else:
            o, after = self._continued(q, k, v, g, gain, f.get("inputs"), ctx, old)
        return Out(self.inner.finish(o, x_BTD, f, ctx), after)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, gain: Tensor, ctx: Ctx) -> Tensor:
        return by_document(lambda *x: self._chunks(*x)[0], ctx, q, k, v, g, gain)

    def _chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        gain: Tensor,
        S: Tensor | None = None,
        place: Tensor | None = None,
        length: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs `(R, L, H, V)` and the buckets after each row's last token."""
        (R, L, H, K), V = q.shape, v.shape[-1]
        if S is None:
            S = q.new_zeros(R, self.levels, H, K, V)
        if place is None:
            place = torch.zeros(R, dtype=torch.long, device=q.device)
        if length is None:
            length = torch.full_like(place, L)
        done = []
        chunks = (t.split(CHUNK, 1) for t in (q, k, v, g, gain))
        for qc, kc, vc, gc, gains in zip(*chunks, strict=True):
            done.append(read(qc, kc, vc, gc, gains, S, place))
            here = length.clamp(max=qc.shape[1])
            S = advance(S, place, kc, vc, gc, here)
            place, length = place + here, length - here
        return torch.cat(done, 1) if L else torch.zeros_like(v), S

    def _continued(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        gain: Tensor,
        inputs: Tensor | None,
        ctx: Ctx,
        state: Fenwick,
    ) -> tuple[Tensor, Fenwick | DraftFenwick]:
        """Outputs of documents that go on from their slots."""
        (B, T), N = q.shape[:2], state.S.shape[0]
        docs = Docs.of(ctx.layout, N)
        rq, rk, rv, rg, gains = (docs.unpack(t) for t in (q, k, v, g, gain))
        before, place = docs.read(state.S), docs.read(state.place, 0).long()
        o, S = self._chunks(rq, rk, rv, rg, gains, before, place, docs.length)
        y, w = docs.pack(o, B, T), docs.written(N)
        if inputs is None:
            inputs = state.tail.new_zeros(rq.shape[0], rq.shape[1], 0)
        size = state.tail.shape[1]
        if not ctx.draft:
            tail = tail_of(inputs, size, docs.length)
            return y, Fenwick(
                w.write(state.S, S),
                w.write(state.place, place + docs.length),
                w.write(state.tail, tail),
            )
        taken = w.take(inputs).to(state.tail.dtype)
        old = torch.where(w.hit[:, None, None], taken[:, :size], state.tail)
        return y, DraftFenwick(
            w.write(state.S, before),
            w.write(state.place, place),
            w.take(rk),
            w.take(rv),
            w.take(rg),
            torch.cat((old, taken[:, size:]), dim=1),
            w.length,
        )

    def initial_state(self, n: int, max_len: int) -> Fenwick:
        inner = self.inner.initial_state(n, max_len)
        S = inner.S[:, None].repeat(1, self.levels, 1, 1, 1)
        place = torch.zeros(n, dtype=torch.long, device=S.device)
        return Fenwick(S, place, inner.tail)

    def state_bytes(self, n: int, max_len: int) -> int:
        own = next(self.inner.parameters()).element_size()
        inner = self.inner.initial_state(1, max_len)
        matrix = inner.S[0].numel() * max(own, 4)
        return self.inner.state_bytes(n, max_len) + n * ((self.levels - 1) * matrix + 8)


@MIXERS.register("log_linear")
class LogLinearConfig(Config):
    """Log-linear attention over a linear mixer."""

    kind: Literal["log_linear"] = "log_linear"
    inner: MIXERS.field = Field(  # type: ignore[valid-type]
        default="linear_attention", validate_default=True
    )
    levels: Annotated[
        int, Field(gt=1, description="buckets: exact to 2^(levels - 1) tokens, one beyond")
    ] = 16

    def build(self, d_model: int, linear: Callable[..., Linear] | None = None) -> LogLinear:
        linear = linear or DenseConfig().build
        inner = wrapped(self.inner, "log_linear").build(d_model, linear)
        return LogLinear(d_model, inner, self.levels, linear)

    @classmethod
    def smallest(cls) -> LogLinearConfig:
        inner = LinearAttentionConfig(heads=2, feature="silu", normalise=False, decay="scalar")
        return cls(inner=inner, levels=4)
