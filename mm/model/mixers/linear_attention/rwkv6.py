"""RWKV-6 time mixing. B rows, T tokens, D model, H heads, K width of a head, N slots, R rows of one
document, L their length, P = 5 mixtures of a token and the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.linear_attention import linear_attention
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS
from mm.state import DataclassState, State

RECEPTANCE, KEY, VALUE, GATE, DECAY = range(5)


@dataclass(frozen=True)
class Receptance(DataclassState):
    """The matrix of each head, and the last input."""

    S: Tensor  # (N, H, K, K) float32 or wider
    last: Tensor  # (N, D)

    def accept(self, n_N: Tensor) -> Receptance:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> Receptance:
        return self


@dataclass(frozen=True)
class DraftReceptance(DataclassState):
    """What a draft call began from and was fed: accepting replays a prefix of it."""

    S: Tensor  # (N, H, K, K)
    k: Tensor  # (N, L, H, K)
    v: Tensor  # (N, L, H, K)
    g: Tensor  # (N, L, H, K)
    inputs: Tensor  # (N, 1 + L, D) the last input before the call, then the call's
    length: Tensor  # (N,)

    def accept(self, n_N: Tensor) -> Receptance:
        n = torch.minimum(n_N.to(self.length), self.length)
        L = self.k.shape[1]
        kept = torch.arange(L, device=n.device) < n[:, None]
        k, v, g = (torch.where(kept[..., None, None], t, 0) for t in (self.k, self.v, self.g))
        _, S = linear_attention(torch.zeros_like(k), k, v, g, self.S)
        last = self.inputs.gather(1, n[:, None, None].expand(-1, 1, self.inputs.shape[-1]))
        return Receptance(S, last[:, 0])

    def commit(self) -> Receptance:
        return self.accept(self.length)


class RWKV6(Mixer):
    """``o_t = r_t (S_{t-1} + diag(u) k_t v_t^T)``, ``S_t = diag(w_t) S_{t-1} + k_t v_t^T``, with
    ``w = exp(-exp(d))``; then a norm by head, a swish gate and the output projection.

    Receptance r, key, value, gate and d read the token mixed with the one before it, each in shares
    that a small network finds (ddlerp). The recurrence is `linear_attention` one step late: its
    queries read the state before the token, and the bonus u adds the token itself.

    Source: Peng et al. 2024, Eagle and Finch (arXiv:2404.05892), section 4.2, eq. 14-19.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, config: RWKV6Config, d_model: int, linear: LinearFactory):
        super().__init__()
        self.config, self.heads, D = config, config.heads, d_model
        low = config.mix_rank
        self.mix_base = nn.Parameter(torch.empty(D))
        self.mix = nn.Parameter(torch.empty(5, D))
        self.mix_in = linear(D, 5 * low, "mix_in")
        self.mix_out = nn.Parameter(torch.empty(5, low, D))
        self.projections = nn.ModuleList(
            linear(D, D, name) for name in ("receptance", "key", "value", "gate")
        )
        self.decay_in = linear(D, config.decay_rank, "decay_in")
        self.decay_out = nn.Parameter(torch.empty(config.decay_rank, D))
        self.decay = nn.Parameter(torch.empty(D))
        self.bonus = nn.Parameter(torch.empty(D))
        self.norm_weight = nn.Parameter(torch.empty(D))
        self.norm_bias = nn.Parameter(torch.empty(D))
        self.out = linear(D, D, "out")

    def init_weights(self) -> None:
        nn.init.uniform_(self.mix_base, 0, 1)
        nn.init.uniform_(self.mix, 0, 1)
        # Small: mixtures and decays begin as those of the plain vectors.
        nn.init.uniform_(self.mix_out, -1e-2, 1e-2)
        nn.init.uniform_(self.decay_out, -1e-2, 1e-2)
        with torch.no_grad():
            place = torch.arange(len(self.decay), dtype=torch.float32) / max(1, len(self.decay) - 1)
            self.decay.copy_(-6 + 5 * place**0.9)
            self.bonus.copy_(0.5 * (1 - place))
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        if state is None:
            o, after = self._forward_full(x_BTD, ctx), None
        else:
            assert isinstance(state, Receptance | DraftReceptance)
            o, after = self._forward_cached(x_BTD, ctx, state.commit())
        return Out(self.out(o, ctx), after)

    def _forward_full(self, x: Tensor, ctx: Ctx) -> Tensor:
        """What the output projection reads, of documents that all begin here."""
        return per_document(lambda rows: self._rows(rows, ctx), ctx, x)

    def _rows(self, x: Tensor, ctx: Ctx) -> Tensor:
        r, k, v, g, gate = self._features(x, F.pad(x, (0, 0, 1, 0))[:, :-1], ctx)
        late = [F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1] for t in (k, v, g)]
        o, _ = linear_attention(r, *late)
        return self._finished(o, r, k, v, gate)

    def _forward_cached(
        self, x: Tensor, ctx: Ctx, state: Receptance
    ) -> tuple[Tensor, Receptance | DraftReceptance]:
        """The same of documents that go on from their slots."""
        (B, T), N = x.shape[:2], state.S.shape[0]
        docs = PackedRows.of(ctx.layout, N)
        rows = docs.unpack(x)
        inputs = torch.cat((docs.read(state.last)[:, None].to(rows.dtype), rows), 1)
        r, k, v, g, gate = self._features(rows, inputs[:, :-1], ctx)
        valid = docs.valid[..., None, None]
        k, v, g = (torch.where(valid, t, 0) for t in (k, v, g))
        before = docs.read(state.S)
        # One place more: the state after the last token is that before a token to come.
        late = [F.pad(t, (0, 0, 0, 0, 1, 0)) for t in (k, v, g)]
        o, S = linear_attention(F.pad(r, (0, 0, 0, 0, 0, 1)), *late, before)
        y = docs.pack(self._finished(o[:, :-1], r, k, v, gate), B, T)
        w = docs.written(N)
        taken = w.take(inputs).to(state.last.dtype)
        old = torch.where(w.hit[:, None], taken[:, 0], state.last)
        if ctx.draft:
            inputs = torch.cat((old[:, None], taken[:, 1:]), 1)
            return y, DraftReceptance(
                w.write(state.S, before), w.take(k), w.take(v), w.take(g), inputs, w.length
            )
        last = inputs.gather(1, docs.length[:, None, None].expand(-1, 1, inputs.shape[-1]))[:, 0]
        return y, Receptance(w.write(state.S, S), w.write(state.last, last))

    def _features(self, x: Tensor, previous: Tensor, ctx: Ctx) -> tuple[Tensor, ...]:
        """Receptance, key, value and log decay `(R, L, H, K)`, float32 or wider, and the gate."""
        R, L, D = x.shape
        gap = previous - x
        low = torch.tanh(self.mix_in(x + gap * self.mix_base, ctx)).unflatten(
            -1, (5, self.config.mix_rank)
        )
        share = torch.einsum("rlpi,pid->prld", low, self.mix_out) + self.mix[:, None, None]
        mixed = (x + gap * share).unbind(0)
        r, k, v, gate = (
            project(mixed[i], ctx)
            for i, project in zip((RECEPTANCE, KEY, VALUE, GATE), self.projections, strict=True)
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        raw = torch.tanh(self.decay_in(mixed[DECAY], ctx)) @ self.decay_out
        g = -torch.exp(raw.to(wide) + self.decay.to(wide))
        heads = lambda t: t.to(wide).view(R, L, self.heads, D // self.heads)
        return heads(r), heads(k), heads(v), heads(g), gate

    def _finished(self, o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Bonus, norm by head and gate: `(R, L, D)`."""
        u = self.bonus.to(o).view(self.heads, -1)
        o = o + (r * u * k).sum(-1, keepdim=True) * v
        # Heads are groups of 64 channels in the paper, whose epsilon grows with them.
        o = F.layer_norm(o, o.shape[-1:], eps=1e-5 * self.heads).flatten(2)
        o = o * self.norm_weight.to(o) + self.norm_bias.to(o)
        return F.silu(gate) * o.to(gate.dtype)

    def _sizes(self) -> tuple[int, int]:
        D = len(self.bonus)
        return self.heads * (D // self.heads) ** 2, D

    def initial_state(self, n: int, max_len: int) -> Receptance:
        like, (_, D) = self.bonus.detach(), self._sizes()
        wide, K = torch.promote_types(like.dtype, torch.float32), D // self.heads
        return Receptance(like.new_zeros(n, self.heads, K, K, dtype=wide), like.new_zeros(n, D))

    def state_bytes(self, n: int, max_len: int) -> int:
        item, (matrix, last) = self.bonus.element_size(), self._sizes()
        return n * (matrix * max(item, 4) + last * item)


@MIXERS.register("rwkv6")
class RWKV6Config(Config):
    """RWKV-6: decays by channel and token, token shift, a bonus for the token itself."""

    kind: Literal["rwkv6"] = "rwkv6"
    heads: Annotated[int, Field(gt=0)] = 4
    mix_rank: Annotated[int, Field(gt=0, description="of the network that mixes two tokens")] = 32
    decay_rank: Annotated[int, Field(gt=0, description="of the decay's projection")] = 64

    def build(self, d_model: int, linear: LinearFactory = dense) -> RWKV6:
        if d_model % self.heads:
            raise ValueError(f"rwkv6: {self.heads} heads do not divide d_model {d_model}")
        return RWKV6(self, d_model, linear)

    @classmethod
    def smallest(cls) -> RWKV6Config:
        return cls(heads=2, mix_rank=2, decay_rank=2)
