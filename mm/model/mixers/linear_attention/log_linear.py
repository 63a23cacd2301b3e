"""Log-linear attention: a linear mixer with one matrix state for each scale of its past.

B rows, T tokens, D model, H heads, K key width, V value width, E levels, N slots, R rows of one
document, L their length, C places of a chunk, W width of what is convolved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.mixers.linear_attention.delta_rule import DeltaRule, DeltaRuleConfig
from mm.model.mixers.linear_attention.linear_attention import (
    LinearAttention,
    LinearAttentionConfig,
    wrapped,
)
from mm.model.mixers.linear_attention.memory import Matrix, tail_of
from mm.model.varlen import PackedRows, per_document, pieces
from mm.registry import MIXERS, MixerField
from mm.state import DataclassState, State

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
class Fenwick(DataclassState):
    """A matrix for each level and head, and the convolution's last inputs."""

    S: Tensor  # (N, E, H, K, V) float32 or wider
    place: Tensor  # (N,) int64 tokens so far
    tail: Tensor  # (N, conv_size - 1, W)

    def accept(self, n_N: Tensor) -> Fenwick:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> Fenwick:
        return self


@dataclass(frozen=True)
class DraftFenwick(DataclassState):
    """What a draft call began from and was fed: accepting replays a prefix of it."""

    S: Tensor  # (N, E, H, K, V)
    place: Tensor  # (N,)
    k: Tensor  # (N, L, H, K)
    v: Tensor  # (N, L, H, V)
    g: Tensor  # (N, L, H)
    beta: Tensor | None  # (N, L, H)
    inputs: Tensor  # (N, conv_size - 1 + L, W)
    length: Tensor  # (N,)

    def accept(self, n_N: Tensor) -> Fenwick:
        n = torch.minimum(n_N.to(self.length), self.length)
        S = chunks(None, self.k, self.v, self.g, self.beta, None, self.S, self.place, n)[1]
        tail = tail_of(self.inputs, self.inputs.shape[1] - self.k.shape[1], n)
        return Fenwick(S, self.place + n, tail)

    def commit(self) -> Fenwick:
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


class Steps(NamedTuple):
    """What the tokens of a chunk do to states and read from each other, before levels weigh it."""

    scores: Tensor | None  # (R, H, L, L) what each place reads of each value
    reach: Tensor | None  # (R, L, H, K) what it reads of the states before the chunk
    keep: Tensor  # (R, L, H, K) the key under which its value is in the state after the chunk
    begun: Tensor | None  # (R, L, H, K) delta rule: what it reads of them to erase it
    total: Tensor  # (R, H) decay over the chunk

    @staticmethod
    def of(q: Tensor | None, k: Tensor, g: Tensor, beta: Tensor | None) -> Steps:
        """Steps of ``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, or with ``beta`` of the delta rule
        ``S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T``.

        Args:
            q: `(R, L, H, K)`; None: nothing is read.
            k: `(R, L, H, K)`; g, beta: `(R, L, H)`; zeros at places that do not count.
        """
        L = k.shape[1]
        log = g.double().cumsum(1).transpose(1, 2)  # (R, H, L)
        since = log.transpose(1, 2).exp().to(k)[..., None]
        until = (log[..., -1:] - log).transpose(1, 2).exp().to(k)[..., None]
        total = log[..., -1].exp().to(k)
        if q is None and beta is None:
            return Steps(None, None, k * until, None, total)
        future = torch.ones(L, L, dtype=torch.bool, device=k.device).triu(1)
        between = (log[..., None] - log[..., None, :]).masked_fill(future, -torch.inf).exp().to(k)
        scores = None if q is None else torch.einsum("rlhk,rmhk->rhlm", q, k) * between
        if beta is None:
            assert q is not None
            return Steps(scores, q * since, k * until, None, total)
        strength = beta.transpose(1, 2)  # (R, H, L)
        system = torch.einsum("rlhk,rmhk->rhlm", k, k) * between * strength[..., None]
        # What is truly written for each value: the chunk's erasures undone.
        written = torch.linalg.solve_triangular(
            system.tril(-1), strength.diag_embed(), upper=False, unitriangular=True
        )
        begun = k * since
        keep = torch.einsum("rhlm,rlhk->rmhk", written, k * until)
        if scores is None or q is None:
            return Steps(None, None, keep, begun, total)
        scores = scores @ written
        reach = q * since - torch.einsum("rhlm,rmhk->rlhk", scores, begun)
        return Steps(scores, reach, keep, begun, total)


def advance(S: Tensor, place: Tensor, steps: Steps, v: Tensor, length: Tensor) -> Tensor:
    """Buckets after ``length`` more tokens: each old bucket and token goes where the last token's
    reader has it.

    Args:
        S: `(R, E, H, K, V)` buckets of a reader at ``place`` - 1.
        place: `(R,)` tokens before.
        steps: of the chunk; places from ``length`` on do nothing.
        v: `(R, L, H, V)`.
        length: `(R,)`; 0 leaves a row's buckets alone.
    """
    E, L = S.shape[1], v.shape[1]
    end = place + length - 1
    into = F.one_hot(bucket_level(end, place, E), E).to(S)  # (R, E old, E new)
    # An empty reader's past (no token yet) is zeros: it may go anywhere.
    moved = torch.einsum("ref,rehkv->rfhkv", into, S)
    kept = steps.total[:, None, :, None, None] * moved
    if steps.begun is not None:
        read = torch.einsum("rlhk,rfhkv->rflhv", steps.begun, moved)
        kept = kept - torch.einsum("rlhk,rflhv->rfhkv", steps.keep, read)
    at = place[:, None] + torch.arange(L, device=v.device)
    to = F.one_hot(level(end[:, None], torch.minimum(at, end[:, None]), E), E).to(S)
    added = torch.einsum("rle,rlhk,rlhv->rehkv", to, steps.keep, v)
    return torch.where((length > 0).view(-1, 1, 1, 1, 1), kept + added, S)


def read(steps: Steps, v: Tensor, gain: Tensor, S: Tensor, place: Tensor) -> Tensor:
    """Outputs `(R, L, H, V)` of a chunk: masked scores inside it, buckets before it.

    Args:
        steps: of the chunk, with queries.
        v: `(R, L, H, V)`.
        gain: `(R, L, H, E)` how much each reader makes of each level.
        S: `(R, E, H, K, V)` buckets before; place: `(R,)` tokens before.
    """
    assert steps.scores is not None and steps.reach is not None
    L, E = v.shape[1], gain.shape[-1]
    at = place[:, None] + torch.arange(L, device=v.device)
    levels = level(at[:, :, None], torch.minimum(at[:, None], at[:, :, None]), E)  # (R, L, L)
    share = gain.transpose(1, 2).gather(3, levels[:, None].expand(-1, gain.shape[2], -1, -1))
    inside = torch.einsum("rhlm,rmhv->rlhv", steps.scores * share, v)
    # An old bucket is inside one bucket of every later reader.
    old = bucket_level(at, place[:, None].expand_as(at), E)  # (R, L, E)
    share = gain.gather(3, old[:, :, None].expand(-1, -1, gain.shape[2], -1))
    return inside + torch.einsum("rlhk,rlhe,rehkv->rlhv", steps.reach, share, S)


def chunks(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    gain: Tensor | None,
    S: Tensor,
    place: Tensor,
    length: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs `(R, L, H, V)` (zeros without queries) and the buckets after each row's last token.

    Args:
        q, k, g, beta: as in `Steps.of`; v, gain, S, place: as in `read`.
        length: `(R,)` places of each row that count.
    """
    L, done = k.shape[1], []
    real = torch.arange(L, device=k.device) < length[:, None]
    drop = lambda x: x.masked_fill(~real.view(*real.shape, *[1] * (x.dim() - 2)), 0)
    k, v, g = drop(k), drop(v), drop(g)
    beta = None if beta is None else drop(beta)
    for qc, kc, vc, gc, bc, weights in pieces(CHUNK, q, k, v, g, beta, gain):
        steps = Steps.of(qc, kc, gc, bc)
        if weights is not None:
            done.append(read(steps, vc, weights, S, place))
        fed = length.clamp(max=vc.shape[1])
        S = advance(S, place, steps, vc, fed)
        place, length = place + fed, length - fed
    return torch.cat(done, 1) if done else torch.zeros_like(v), S


class LogLinear(Mixer):
    """``o_t = sum_e l_t^e S_t^e q_t``: state e sums keys and values of the e-th bucket of the past,
    and each token weighs the levels as it likes.

    Wraps a `linear_attention` whose decays are by head (Mamba-2, RetNet, simple GLA and their like)
    or a `delta_rule`, where tokens erase from the states of all levels alike. With all weights 1 it
    is that mixer. Training costs O(T log T), a state has E matrices.

    Source: Guo et al. 2025, Log-linear attention (arXiv:2506.04761); the delta rule: there, as
    Log-linear Gated DeltaNet.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(
        self,
        d_model: int,
        inner: LinearAttention | DeltaRule,
        levels: int,
        linear: LinearFactory,
    ):
        super().__init__()
        self.inner, self.levels = inner, levels
        self.gain = linear(d_model, inner.heads * levels, "gain")
        self.gain_bias = nn.Parameter(torch.empty(inner.heads * levels))

    def init_weights(self) -> None:
        nn.init.constant_(self.gain_bias, 0.5413)  # softplus: levels begin with weight 1

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        B, T = x_BTD.shape[:2]
        old = None
        if state is not None:
            assert isinstance(state, Fenwick | DraftFenwick)
            old = state.commit()
        # The wrapped mixer reads the convolution's tail from a State of its own.
        f = self.inner.features(x_BTD, ctx, Matrix(old.S, old.tail) if old is not None else None)
        q, k, v = f["q"], f["k"], f["v"]
        g, beta = f.get("g"), f.get("beta")
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        g = (g if g is not None else q.new_zeros(())).expand(B, T, self.inner.heads)
        raw = self.gain(x_BTD, ctx).to(q) + self.gain_bias.to(q)
        gain = F.softplus(raw).view(B, T, -1, self.levels)
        parts = (q, k, v, g, gain, *([] if beta is None else [beta]))
        after: State | None = None
        # Rounding by autocast would undo what sums in float32 are for.
        with torch.autocast(x_BTD.device.type, enabled=False):
            if old is None:
                o = per_document(self._fresh, ctx, *parts)
            else:
                o, after = self._forward_cached(parts, f.get("inputs"), ctx, old)
        return Out(self.inner.finish(o, x_BTD, f, ctx), after)

    def _fresh(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, gain: Tensor, beta: Tensor | None = None
    ) -> Tensor:
        """Outputs `(R, L, H, V)` of rows that begin here: with as many levels as L tokens have."""
        (R, L, H, K), V = q.shape, v.shape[-1]
        E = min(self.levels, max(2, (L - 1).bit_length() + 1))
        S, none = q.new_zeros(R, E, H, K, V), torch.zeros(R, dtype=torch.long, device=q.device)
        return chunks(q, k, v, g, beta, gain[..., :E], S, none, torch.full_like(none, L))[0]

    def _forward_cached(
        self, parts: tuple[Tensor, ...], inputs: Tensor | None, ctx: Ctx, state: Fenwick
    ) -> tuple[Tensor, Fenwick | DraftFenwick]:
        """Outputs of documents that go on from their slots."""
        (B, T), N = parts[0].shape[:2], state.S.shape[0]
        docs = PackedRows.of(ctx.layout, N)
        rq, rk, rv, rg, gains, *rest = map(docs.unpack, parts)
        beta = rest[0] if rest else None
        before, place = docs.read(state.S), docs.read(state.place, 0).long()
        o, S = chunks(rq, rk, rv, rg, beta, gains, before, place, docs.length)
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
            None if beta is None else w.take(beta),
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
    inner: MixerField = Field(default="linear_attention", validate_default=True)
    levels: Annotated[
        int, Field(gt=1, description="buckets: exact to 2^(levels - 1) tokens, one beyond")
    ] = 16

    def build(self, d_model: int, linear: LinearFactory = dense) -> LogLinear:
        inner = self.inner
        if not isinstance(inner, DeltaRuleConfig):
            inner = wrapped(inner, "log_linear", "a delta_rule, or ")
        return LogLinear(d_model, inner.build(d_model, linear), self.levels, linear)

    @classmethod
    def smallest(cls) -> LogLinearConfig:
        inner = LinearAttentionConfig(heads=2, feature="silu", normalise=False, decay="scalar")
        return cls(inner=inner, levels=4)
