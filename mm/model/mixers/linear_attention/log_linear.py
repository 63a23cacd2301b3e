"""Log-linear attention: a linear mixer with one matrix state for each scale of its past.

B rows, T tokens, D model, H heads, K key width, V value width, E levels, N slots, R rows of one
document, L their length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.linear_attention.delta_rule import DeltaRuleConfig
from mm.model.mixers.linear_attention.linear_attention import (
    SMALL_SCALAR,
    require_head_decay,
)
from mm.model.sequence import carry_over
from mm.model.stateful import Stateful, StatePart
from mm.model.varlen import PackedRows, per_document, pieces
from mm.registry import MIXERS, MixerField
from mm.state import DataclassState, State, join_parts, parts_of

CHUNK = 64


def level(reader: Tensor, read: Tensor, levels: int) -> Tensor:
    """Which bucket of the reader's past a token is in, by their positions.

    0 is the reader itself, then the highest bit in which the positions differ, from 1; the last
    level keeps all that is further away. Buckets are those of a Fenwick tree: powers of two of
    positions, the smaller the nearer.

    Args:
        reader: `(...)` int64 positions.
        read: `(...)` int64 positions, not later.
    """
    gap = torch.bitwise_xor(reader, read)
    bits = torch.arange(levels - 1, device=gap.device)
    return (gap[..., None] >> bits > 0).sum(-1)


@dataclass(frozen=True)
class Fenwick(DataclassState):
    """A matrix for each level and head."""

    S: Tensor  # (N, E, H, K, V) float32 or wider
    count: Tensor  # (N,) int64 tokens so far


def bucket_level(reader: Tensor, count: Tensor, levels: int) -> Tensor:
    """`(..., E)` which bucket of a later ``reader`` holds each bucket of ``count`` tokens.

    A bucket is never divided. Empty ones may go anywhere.

    Args:
        reader: `(...)` int64 position.
        count: `(...)` int64 tokens that had come.
    """
    last = (count - 1).clamp_min(0)[..., None]
    bits = torch.arange(1, levels - 1, device=count.device)
    # The bucket of level e differs in bit e - 1, where ``last`` has a one, and agrees above it:
    # one of its positions is ``last`` without the e lowest bits.
    inside = torch.cat((last, last >> bits << bits), -1)
    found = level(reader[..., None], inside, levels)
    # What is in the last level stays there.
    return F.pad(found, (0, 1), value=levels - 1)


class Steps(NamedTuple):
    """What the tokens of a chunk do to states and read from each other, before levels weigh it."""

    scores: Tensor  # (R, H, L, L) what each token reads of each value
    reach: Tensor  # (R, L, H, K) what it reads of the states before the chunk
    keep: Tensor  # (R, L, H, K) the key under which its value is in the state after the chunk
    begun: Tensor | None  # (R, L, H, K) delta rule: what it reads of them to erase it
    total: Tensor  # (R, H) decay over the chunk

    @staticmethod
    def of(q: Tensor, k: Tensor, g: Tensor, beta: Tensor | None) -> Steps:
        """Steps of ``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, or with ``beta`` of the delta rule.

        The delta rule: ``S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T``.

        Args:
            q: `(R, L, H, K)`; k alike, zeros at tokens that do not count.
            g: `(R, L, H)`, zeros there; beta alike.
        """
        L = k.shape[1]
        log = g.double().cumsum(1).transpose(1, 2)  # (R, H, L)
        since = log.transpose(1, 2).exp().to(k)[..., None]
        until = (log[..., -1:] - log).transpose(1, 2).exp().to(k)[..., None]
        total = log[..., -1].exp().to(k)
        future = torch.ones(L, L, dtype=torch.bool, device=k.device).triu(1)
        between = (log[..., None] - log[..., None, :]).masked_fill(future, -torch.inf).exp().to(k)
        scores = torch.einsum("rlhk,rmhk->rhlm", q, k) * between
        if beta is None:
            return Steps(scores, q * since, k * until, None, total)
        strength = beta.transpose(1, 2)  # (R, H, L)
        system = torch.einsum("rlhk,rmhk->rhlm", k, k) * between * strength[..., None]
        # What is truly written for each value: the chunk's erasures undone.
        written = torch.linalg.solve_triangular(
            system.tril(-1), strength.diag_embed(), upper=False, unitriangular=True
        )
        begun = k * since
        keep = torch.einsum("rhlm,rlhk->rmhk", written, k * until)
        scores = scores @ written
        reach = q * since - torch.einsum("rhlm,rmhk->rlhk", scores, begun)
        return Steps(scores, reach, keep, begun, total)


def advance(S: Tensor, count: Tensor, steps: Steps, v: Tensor, length: Tensor) -> Tensor:
    """Buckets after ``length`` more tokens: each goes where the last token's reader has it.

    Args:
        S: `(R, E, H, K, V)` buckets of ``count`` tokens.
        count: `(R,)`.
        steps: of the chunk; tokens from ``length`` on do nothing.
        v: `(R, L, H, V)`.
        length: `(R,)`; 0 leaves a row's buckets alone.
    """
    E, L = S.shape[1], v.shape[1]
    end = count + length - 1
    into = F.one_hot(bucket_level(end, count, E), E).to(S)  # (R, E old, E new)
    # An empty reader's past (no token yet) is zeros: it may go anywhere.
    moved = torch.einsum("ref,rehkv->rfhkv", into, S)
    old = steps.total[:, None, :, None, None] * moved
    if steps.begun is not None:
        read = torch.einsum("rlhk,rfhkv->rflhv", steps.begun, moved)
        old = old - torch.einsum("rlhk,rflhv->rfhkv", steps.keep, read)
    at = count[:, None] + torch.arange(L, device=v.device)
    to = F.one_hot(level(end[:, None], torch.minimum(at, end[:, None]), E), E).to(S)
    added = torch.einsum("rle,rlhk,rlhv->rehkv", to, steps.keep, v)
    return torch.where((length > 0).view(-1, 1, 1, 1, 1), old + added, S)


def read(steps: Steps, v: Tensor, gain: Tensor, S: Tensor, count: Tensor) -> Tensor:
    """Outputs `(R, L, H, V)` of a chunk: masked scores inside it, buckets before it.

    Args:
        steps: of the chunk.
        v: `(R, L, H, V)`.
        gain: `(R, L, H, E)` how much each reader makes of each level.
        S: `(R, E, H, K, V)` buckets before; count: `(R,)` tokens before.
    """
    L, E = v.shape[1], gain.shape[-1]
    at = count[:, None] + torch.arange(L, device=v.device)
    levels = level(at[:, :, None], torch.minimum(at[:, None], at[:, :, None]), E)  # (R, L, L)
    share = gain.transpose(1, 2).gather(3, levels[:, None].expand(-1, gain.shape[2], -1, -1))
    inside = torch.einsum("rhlm,rmhv->rlhv", steps.scores * share, v)
    # An old bucket is inside one bucket of every later reader.
    old = bucket_level(at, count[:, None].expand_as(at), E)  # (R, L, E)
    share = gain.gather(3, old[:, :, None].expand(-1, -1, gain.shape[2], -1))
    return inside + torch.einsum("rlhk,rlhe,rehkv->rlhv", steps.reach, share, S)


def chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    gain: Tensor,
    S: Tensor,
    count: Tensor,
    length: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs `(R, L, H, V)` and the buckets after each row's last token.

    Args:
        q, k, g, beta: as in `Steps.of`; v, gain, S, count: as in `read`.
        length: `(R,)` tokens of each row that count.
    """
    L, done = k.shape[1], []
    real = torch.arange(L, device=k.device) < length[:, None]
    drop = lambda x: x.masked_fill(~real.view(*real.shape, *[1] * (x.dim() - 2)), 0)
    k, v, g = drop(k), drop(v), drop(g)
    beta = None if beta is None else drop(beta)
    for qc, kc, vc, gc, bc, weights in pieces(CHUNK, q, k, v, g, beta, gain):
        steps = Steps.of(qc, kc, gc, bc)
        done.append(read(steps, vc, weights, S, count))
        fed = length.clamp(max=vc.shape[1])
        S = advance(S, count, steps, vc, fed)
        count, length = count + fed, length - fed
    return torch.cat(done, 1) if done else torch.zeros_like(v), S


class BucketMemory(StatePart):
    """A matrix for each bucket of the past and each head."""

    documents_apart = True

    def __init__(self, heads: int, key_dim: int, value_dim: int, levels: int):
        super().__init__()
        self.levels, self.shape = levels, (levels, heads, key_dim, value_dim)

    def forward(
        self, f: dict[str, Tensor], gain: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, Fenwick | None]:
        """Outputs `(B, T, H, V)` of every document, and the State after the call.

        Args:
            f: features of the wrapped mixer.
            gain: `(B, T, H, E)` weights of the levels.
        """
        q, k, v = f["q"].to(gain), f["k"].to(gain), f["v"].to(gain)
        g = f.get("g", q.new_zeros(())).expand(q.shape[:3])
        parts = (q, k, v, g, gain, *([f["beta"]] if "beta" in f else []))
        if state is None:
            return self._whole(ctx, parts), None
        assert isinstance(state, Fenwick)
        docs = PackedRows.of(ctx.layout, state.S.shape[0])
        q, k, v, g, gain, *rest = map(docs.unpack, parts)
        S, count = docs.read(state.S), docs.read(state.count, 0).long()
        o, S = chunks(q, k, v, g, rest[0] if rest else None, gain, S, count, docs.length)
        return docs.pack(o), docs.write(state, S=S, count=count + docs.length)

    def _whole(self, ctx: Ctx, parts: tuple[Tensor, ...]) -> Tensor:
        """Outputs of documents that begin here, or of the own slice of those of several ones."""
        fresh = lambda: per_document(self._first, ctx, *parts)
        if ctx.shard is None:
            return fresh()
        shard, B = ctx.shard, ctx.layout.shape[0]

        def run(docs: PackedRows, S: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v, g, gain, *rest = map(docs.unpack, parts)
            count = shard.earlier.long() if docs.layout is shard.head else shard.earlier.long() * 0
            return chunks(q, k, v, g, rest[0] if rest else None, gain, S, count, docs.length)

        # A bucket's place depends on how many tokens came before: processes go one after another.
        return carry_over(fresh, run, self.zeros(B, *self.shape), shard, None)

    def _first(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, gain: Tensor, beta: Tensor | None = None
    ) -> Tensor:
        """Outputs `(R, L, H, V)` of rows that begin here, with the levels that L tokens have."""
        (R, L, H, K), V = q.shape, v.shape[-1]
        E = min(self.levels, max(2, (L - 1).bit_length() + 1))
        S, none = q.new_zeros(R, E, H, K, V), torch.zeros(R, dtype=torch.long, device=q.device)
        return chunks(q, k, v, g, beta, gain[..., :E], S, none, torch.full_like(none, L))[0]

    def initial_state(self, n: int, max_len: int) -> Fenwick:
        return Fenwick(self.zeros(n, *self.shape), self.zeros(n, dtype=torch.long))


class LogLinear(Mixer):
    """``o_t = sum_e l_t^e S_t^e q_t``: state e sums keys and values of the e-th bucket of the past.

    Each token weighs the levels as it likes.
    Wraps a `linear_attention` whose decays are by head (Mamba-2, RetNet, simple GLA and their like)
    or a `delta_rule`, where tokens erase from the states of all levels alike. With all weights 1 it
    is that mixer. Training costs O(T log T), a state has E matrices.

    Source: Guo et al. 2025, Log-linear attention (arXiv:2506.04761); the delta rule: there, as
    Log-linear Gated DeltaNet.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: LogLinearConfig, linear: LinearFactory):
        super().__init__()
        wrapped, levels = config.inner, config.levels
        if not isinstance(wrapped, DeltaRuleConfig):
            wrapped = require_head_decay(wrapped, "log_linear", "a delta_rule, or ")
        inner = wrapped.build(d_model, linear)
        self.inner, self.levels = inner, levels
        self.gain = linear(d_model, inner.heads * levels, "gain")
        self.gain_bias = nn.Parameter(torch.empty(inner.heads * levels))
        self.memory = BucketMemory(*inner.memory.shape, levels=levels)

    def stateful_parts(self) -> list[Stateful]:
        return [self.inner.conv, self.memory]

    def init_weights(self) -> None:
        nn.init.constant_(self.gain_bias, 0.5413)  # softplus: levels begin with weight 1

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        tail, memory = parts_of(state, 2)
        f, tail = self.inner.features(x_BTD, ctx, tail)
        wide = torch.promote_types(f["q"].dtype, torch.float32)
        raw = self.gain(x_BTD, ctx).to(wide) + self.gain_bias.to(wide)
        gain = F.softplus(raw).unflatten(-1, (-1, self.levels))
        # Rounding by autocast would undo what sums in float32 are for.
        with torch.autocast(x_BTD.device.type, enabled=False):
            o, memory = self.memory(f, gain, ctx, memory)
        return Out(self.inner.finish(o, x_BTD, f, ctx), join_parts(tail, memory))


@MIXERS.register("log_linear")
class LogLinearConfig(LayerConfig):
    """Log-linear attention over a linear mixer."""

    kind: Literal["log_linear"] = "log_linear"
    inner: MixerField = Field(default="linear_attention", validate_default=True)
    levels: int = Field(
        default=16, gt=1, description="buckets: exact to 2^(levels - 1) tokens, one beyond"
    )

    layer = LogLinear
    small = {"inner": {**SMALL_SCALAR, "conv_size": 0}, "levels": 4}
