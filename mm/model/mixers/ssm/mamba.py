"""Mamba. B rows, T tokens, D model, E inner width, S states of a channel, K rank of the step size,
N slots, R rows, L their length, C conv size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.causal_conv import causal_conv
from mm.kernels.glu import glu
from mm.kernels.selective_scan import selective_scan
from mm.layout import Layout
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.norm import RMSNorm
from mm.model.varlen import PackedRows
from mm.registry import MIXERS
from mm.state import DataclassState, State

STEP = (1e-3, 1e-1)  # range of the initial step sizes, log-uniform; the paper's section 3.6


@dataclass(frozen=True)
class Selective(DataclassState):
    """Hidden state and the convolution's last inputs."""

    h: Tensor  # (N, S, E) float32 or wider
    tail: Tensor  # (N, C - 1, E)

    def accept(self, n_N: Tensor) -> Selective:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> Selective:
        return self


@dataclass(frozen=True)
class DraftSelective(DataclassState):
    """What a draft call began from and was fed: `accept` runs the accepted places once more.

    Every state it passed through would be S times its inputs.
    """

    h: Tensor  # (N, S, E)
    inputs: Tensor  # (N, C - 1 + L, E) the old tail, then the call's convolution inputs
    u: Tensor  # (N, L, E)
    dt: Tensor  # (N, L, E)
    b: Tensor  # (N, L, S)
    a: Tensor  # (N, S, E) the layer's rates
    length: Tensor  # (N,)

    def accept(self, n_N: Tensor) -> Selective:
        n = torch.minimum(n_N.to(self.length), self.length)
        L, E = self.u.shape[1:]
        conv_size = self.inputs.shape[1] - L  # of the tail
        places = n[:, None] + torch.arange(conv_size, device=n.device)
        tail = self.inputs.gather(1, places[..., None].expand(-1, -1, E))
        if not len(n):
            return Selective(self.h, tail)
        u, dt, b = _only(torch.arange(L, device=n.device) < n[:, None], self.u, self.dt, self.b)
        _, h = selective_scan(u, dt, self.a[0], b, b, u.new_zeros(E), None, self.h)
        return Selective(h.to(self.h.dtype), tail)

    def commit(self) -> Selective:
        return self.accept(self.length)


def _only(valid_RL: Tensor, *x_RL: Tensor) -> tuple[Tensor, ...]:
    """Zeros at the other places: `selective_scan` passes them without touching the state."""
    # Selected, not multiplied: a wrong guess may hold inf.
    return tuple(torch.where(valid_RL[..., None], x, 0.0) for x in x_RL)


class Scan(NamedTuple):
    """What the scan reads at each place."""

    u: Tensor  # (R, L, E)
    dt: Tensor  # (R, L, E) float32 or wider
    b: Tensor  # (R, L, S)
    c: Tensor  # (R, L, S)


class Mamba(Mixer):
    """``out(silu(z) * ssm(silu(conv(x))))`` with ``x, z = inner(input)`` and step size, B and C
    read from the convolved ``x``.

    Source: Gu & Dao 2023 (arXiv:2312.00752), section 3.4, figure 3 and algorithm 2; A from S4D-real
    (section 3.6). The norms of step size, B and C: Lieber et al. 2024, Jamba (arXiv:2403.19887).
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(
        self,
        d_model: int,
        width: int,
        states: int,
        conv_size: int,
        rank: int,
        norms: bool,
        linear: LinearFactory,
    ):
        super().__init__()
        self.width, self.states, self.conv_size, self.rank = width, states, conv_size, rank
        self.inner = linear(d_model, 2 * width, "inner")
        self.select = linear(width, rank + 2 * states, "select")
        self.step = linear(rank, width, "step")
        self.out = linear(width, d_model, "out")
        self.conv_weight = nn.Parameter(torch.empty(conv_size, width))
        self.conv_bias = nn.Parameter(torch.empty(width))
        self.step_bias = nn.Parameter(torch.empty(width))
        self.log_rate = nn.Parameter(torch.empty(states, width))  # log(-A), transposed
        self.skip = nn.Parameter(torch.empty(width))
        sizes = (rank, states, states) if norms else ()
        self.norms = nn.ModuleList(RMSNorm(size) for size in sizes)

    def init_weights(self) -> None:
        nn.init.uniform_(self.conv_weight, -(self.conv_size**-0.5), self.conv_size**-0.5)
        nn.init.zeros_(self.conv_bias)
        nn.init.ones_(self.skip)
        weight = getattr(self.step, "weight", None)
        if isinstance(weight, nn.Parameter):
            nn.init.uniform_(weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            wide = torch.empty_like(self.step_bias, dtype=torch.float32)
            dt = wide.uniform_(math.log(STEP[0]), math.log(STEP[1])).exp()
            self.step_bias.copy_(dt + (-(-dt).expm1()).log())  # inverse of the softplus
            rate = torch.arange(1, self.states + 1, device=wide.device, dtype=torch.float32)
            self.log_rate.copy_(rate.log()[:, None].expand_as(self.log_rate))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        x, z = self.inner(x_BTD, ctx).chunk(2, dim=-1)
        if state is None:
            y, after = self._forward_full(x, ctx), None
        else:
            assert isinstance(state, Selective | DraftSelective)
            y, after = self._forward_cached(x, ctx, state.commit())
        return Out(self.out(glu(z, y, "silu"), ctx), after)

    def _forward_full(self, x: Tensor, ctx: Ctx) -> Tensor:
        """Outputs of documents that all begin here."""
        document = ctx.layout.fields.document
        convolved = causal_conv(x, self.conv_weight, self.conv_bias, document)
        s = self._scanned(convolved, ctx)
        return selective_scan(s.u, s.dt, self._rates(), s.b, s.c, self.skip, _starts(ctx.layout))[0]

    def _forward_cached(
        self, x: Tensor, ctx: Ctx, state: Selective
    ) -> tuple[Tensor, Selective | DraftSelective]:
        """Outputs of documents that go on from their slots."""
        B, T = x.shape[:2]
        n_slots = state.h.shape[0]
        docs = PackedRows.of(ctx.layout, n_slots)
        rows = docs.unpack(x)
        inputs = torch.cat((docs.read(state.tail).to(rows.dtype), rows), dim=1)
        # The tail is the document's own past here: the convolution needs no borders, and its first
        # outputs are the tail's.
        one = torch.ones_like(inputs[..., 0], dtype=torch.int32)
        convolved = causal_conv(inputs, self.conv_weight, self.conv_bias, one)
        s, a = self._scanned(convolved[:, self.conv_size - 1 :], ctx), self._rates()
        before = docs.read(state.h)
        u, dt, b = _only(docs.valid, s.u, s.dt, s.b)  # the last state is that of the last token
        y, last = selective_scan(u, dt, a, b, s.c, self.skip, None, before)
        w = docs.written(n_slots)
        # A slot that nobody writes keeps its state, as one that a row of length 0 wrote.
        tails = w.take(inputs).to(state.tail.dtype)
        old = torch.where(w.hit[:, None, None], tails[:, : self.conv_size - 1], state.tail)
        drafted = DraftSelective(
            torch.where(w.hit[:, None, None], w.take(before), state.h).to(state.h.dtype),
            torch.cat((old, tails[:, self.conv_size - 1 :]), dim=1),
            w.take(u),
            w.take(dt),
            w.take(b),
            a.expand(n_slots, -1, -1),
            w.length,
        )
        if ctx.draft:
            return docs.pack(y, B, T), drafted
        places = w.length[:, None] + torch.arange(self.conv_size - 1, device=x.device)
        tail = drafted.inputs.gather(1, places[..., None].expand(-1, -1, self.width))
        return docs.pack(y, B, T), Selective(w.write(state.h, last), tail)

    def _scanned(self, convolved_RLE: Tensor, ctx: Ctx) -> Scan:
        u = F.silu(convolved_RLE)
        read = self.select(u, ctx).split((self.rank, self.states, self.states), dim=-1)
        if len(self.norms):
            read = tuple(norm(part) for norm, part in zip(self.norms, read, strict=True))
        low, b, c = read
        wide = torch.promote_types(u.dtype, torch.float32)
        dt = F.softplus(self.step(low, ctx).to(wide) + self.step_bias.to(wide))
        return Scan(u, dt, b, c)

    def _rates(self) -> Tensor:
        """A, transposed: `(S, E)` float32 or wider."""
        return -self.log_rate.to(torch.promote_types(self.log_rate.dtype, torch.float32)).exp()

    def initial_state(self, n: int, max_len: int) -> Selective:
        like = self.log_rate.detach()
        wide = torch.promote_types(like.dtype, torch.float32)
        return Selective(
            like.new_zeros(n, self.states, self.width, dtype=wide),
            like.new_zeros(n, self.conv_size - 1, self.width, dtype=like.dtype),
        )

    def state_bytes(self, n: int, max_len: int) -> int:
        item = self.log_rate.element_size()
        return n * self.width * (self.states * max(item, 4) + (self.conv_size - 1) * item)


def _starts(layout: Layout) -> Tensor | None:
    """`(B, T)` bool: a document (or padding) begins here."""
    document = layout.fields.document
    if not document.shape[1]:
        return None
    return F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)


@MIXERS.register("mamba")
class MambaConfig(Config):
    """Selective state space model (Mamba-1)."""

    kind: Literal["mamba"] = "mamba"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    expand: Annotated[int, Field(gt=0, description="inner width / d_model")] = 2
    states: Annotated[int, Field(gt=0, description="states of a channel")] = 16
    conv_size: Annotated[int, Field(gt=1, description="width of the causal convolution")] = 4
    rank: (
        Annotated[int, Field(gt=0, description="of the step size; default d_model / 16")] | None
    ) = None
    norms: Annotated[bool, Field(description="RMS norms of step size, B and C (Jamba)")] = False

    def build(self, d_model: int, linear: LinearFactory = dense) -> Mamba:
        return Mamba(
            d_model,
            self.expand * d_model,
            self.states,
            self.conv_size,
            self.rank or -(-d_model // 16),
            self.norms,
            linear,
        )

    @classmethod
    def smallest(cls) -> MambaConfig:
        return cls(expand=1, states=3)
