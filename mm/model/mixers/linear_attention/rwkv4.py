"""RWKV-4 time mixing. B rows, T tokens, D model, N slots, R rows of one document, L their
length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.linear_scan import linear_scan
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.mixers.conv.state import DraftTail, Tail, preceding
from mm.model.mixers.ssm.scan import DraftHidden, Hidden, advanced
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS
from mm.state import DataclassState, State

RECEPTANCE, KEY, VALUE = range(3)


@dataclass(frozen=True)
class Averaged(DataclassState):
    """The last input, and the sums of weights and values in units of ``exp(m)``."""

    tail: Tail | DraftTail  # (N, 1, D)
    sums: Hidden | DraftHidden  # (N, 3 * D) float32 or wider: m, values, weights

    def accept(self, n_N: Tensor) -> Averaged:
        return Averaged(self.tail.accept(n_N), self.sums.accept(n_N))

    def commit(self) -> Averaged:
        return Averaged(self.tail.commit(), self.sums.commit())


class RWKV4(Mixer):
    """``out(sigmoid(r_t) * wkv_t)``; channel by channel ``wkv_t`` is the average of all values so
    far with weights ``exp(k_i - (t - 1 - i) w)``, the token's own ``exp(u + k_t)``.

    Receptance r, key and value read the token mixed with the one before it. Sums are kept in units
    of ``exp(m_t)``, m the largest exponent so far: no exponent is positive, and as quotients do not
    depend on m no gradient goes through it.

    Source: Peng et al. 2023 (arXiv:2305.13048), section 3.1.2, eq. 11 to 17, in the stable form of
    its appendix D.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, linear: LinearFactory):
        super().__init__()
        D = d_model
        self.mix = nn.Parameter(torch.empty(3, D))
        names = ("receptance", "key", "value")
        self.projections = nn.ModuleList(linear(D, D, name) for name in names)
        self.log_decay = nn.Parameter(torch.empty(D))
        self.bonus = nn.Parameter(torch.empty(D))
        self.out = linear(D, D, "out")

    def init_weights(self) -> None:
        nn.init.uniform_(self.mix, 0, 1)
        with torch.no_grad():
            # Appendix E of the paper, for a layer in the middle of the stack.
            h = torch.arange(len(self.bonus), dtype=torch.float32) / max(1, len(self.bonus) - 1)
            self.log_decay.copy_(-5 + 8 * h**1.35)
            self.bonus.copy_(0.5 * ((torch.arange(len(self.bonus)) + 1) % 3 - 1) - 1.2)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        assert state is None or isinstance(state, Averaged)
        old = state.commit() if state is not None else None
        (x, before), tail = preceding(x_BTD, 1, ctx, old.tail if old is not None else None)
        gap = before - x
        r, k, v = (
            project(x + gap * (1 - self.mix[i]), ctx) for i, project in enumerate(self.projections)
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        k, v = k.to(wide), v.to(wide)
        after = None
        if old is None:
            o = per_document(lambda *rows: self._scanned(*rows)[0], ctx, k, v)
        else:
            assert isinstance(old.sums, Hidden) and tail is not None
            (B, T), slots = x.shape[:2], old.sums.h
            docs = PackedRows.of(ctx.layout, slots.shape[0])
            first = docs.read(slots, self._fresh(slots))
            o, h = self._scanned(docs.unpack(k), docs.unpack(v), first)
            o = docs.pack(o, B, T)
            after = Averaged(tail, advanced(old.sums, docs, first, h, ctx.draft))  # type: ignore[arg-type]
        return Out(self.out(r.sigmoid() * o.to(r.dtype), ctx), after)

    def _fresh(self, like: Tensor) -> Tensor:
        """Sums before the first token: no exponent at all, and nothing summed up."""
        fresh = like.new_zeros(3 * len(self.bonus))
        fresh[: len(self.bonus)] = -torch.inf
        return fresh

    def _scanned(self, k: Tensor, v: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Averages `(R, L, D)` and states `(R, L, 3 * D)` of rows of one document."""
        if before is None:
            before = self._fresh(k).expand(k.shape[0], -1)
        if not k.shape[1]:
            return k, k.new_zeros(*k.shape[:2], before.shape[1])
        m0, sums0 = before[:, None].split((k.shape[2], 2 * k.shape[2]), dim=2)
        speed = self.log_decay.to(k).exp()
        with torch.no_grad():
            # m_t = max(m_0 - t w, max_{i <= t} k_i - (t - i) w). Float64: t w grows with length.
            fall = speed.double() * torch.arange(1, k.shape[1] + 1, device=k.device)[:, None]
            top = torch.cat((m0.double(), k.double() + fall), 1).cummax(1).values
            m = torch.cat((m0.double(), top[:, 1:] - fall), 1)
            lost, m = (m[:, :-1] - m[:, 1:]).to(k), m.to(k)
        keep, weight = (lost - speed).exp(), (k - m[:, 1:]).exp()
        sums, _ = linear_scan(
            torch.cat((keep, keep), -1),
            torch.cat((weight * v, weight), -1),
            None,
            sums0[:, 0].contiguous(),
        )
        values, weights = torch.cat((sums0, sums[:, :-1]), 1).chunk(2, dim=-1)
        own = self.bonus.to(k) + k
        unit = torch.maximum(m[:, :-1], own).detach()
        past, now = (m[:, :-1] - unit).exp(), (own - unit).exp()
        o = (past * values + now * v) / (past * weights + now)
        return o, torch.cat((m[:, 1:], sums), -1)

    def initial_state(self, n: int, max_len: int) -> Averaged:
        like = self.bonus.detach()
        wide = torch.promote_types(like.dtype, torch.float32)
        fresh = self._fresh(like.to(wide)).repeat(n, 1)
        return Averaged(Tail(like.new_zeros(n, 1, len(like))), Hidden(fresh))

    def state_bytes(self, n: int, max_len: int) -> int:
        item = self.bonus.element_size()
        return n * len(self.bonus) * (item + 3 * max(item, 4))


@MIXERS.register("rwkv4")
class RWKV4Config(Config):
    """RWKV-4: a decaying average of values by channel, with a bonus for the token itself."""

    kind: Literal["rwkv4"] = "rwkv4"

    def build(self, d_model: int, linear: LinearFactory = dense) -> RWKV4:
        return RWKV4(d_model, linear)
