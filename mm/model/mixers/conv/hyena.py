"""Long convolution with an implicit filter between gates.

B rows, T tokens, D model, W width, P positions of the cache, N slots, R rows of one document, L
their length, F filter lags.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import ShortConv
from mm.model.stateful import StatePart
from mm.model.varlen import PackedRows, per_document, refuse_overflow
from mm.registry import MIXERS
from mm.state import DataclassState, State, join_parts, parts_of

DIRECT = 64  # rows up to this length are a product with a Toeplitz matrix, longer ones use the FFT
FEW = 8  # tokens of a call that are read off the cache one by one


@dataclass(frozen=True)
class History(DataclassState):
    """What was convolved so far: position i is token i, zeros beyond the last."""

    u: Tensor  # (N, P, W)
    count: Tensor  # (N,) int64


def long_conv(u_RLW: Tensor, filter_FW: Tensor) -> Tensor:
    """``y_t = sum_s filter_{t-s} u_s``, `(R, L, W)`; F >= L.

    Beyond 64 tokens by FFT, whose rounding errors (not values) reach positions before their cause.
    """
    L = u_RLW.shape[1]
    h = filter_FW[:L]
    if L <= DIRECT:
        t = torch.arange(L, device=u_RLW.device)
        lag = t[:, None] - t
        toeplitz = h[lag.clamp_min(0)].masked_fill((lag < 0)[..., None], 0)
        return torch.einsum("tsw,rsw->rtw", toeplitz, u_RLW)
    n = 2 * L
    return torch.fft.irfft(torch.fft.rfft(u_RLW, n, dim=1) * torch.fft.rfft(h, n, dim=0), n, dim=1)[
        :, :L
    ]


class LongConv(StatePart):
    """Convolution over whole documents; keeps every input, as attention keeps keys."""

    documents_apart = True

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(
        self, u_BTW: Tensor, filter: Callable[[int], Tensor], ctx: Ctx, state: State | None
    ) -> tuple[Tensor, History | None]:
        """`long_conv` of every document `(B, T, W)`, and the State after the call.

        Args:
            filter: takes a number of lags F and returns their values `(F, W)`.
        Raises:
            ValueError: a document is longer than its State has positions.
        """
        if state is None:
            h = filter(u_BTW.shape[1])
            return per_document(lambda part: long_conv(part, h), ctx, u_BTW), None
        assert isinstance(state, History)
        N, P = state.u.shape[:2]
        docs = PackedRows.of(ctx.layout, N)
        rows = docs.unpack(u_BTW)
        L = rows.shape[1]
        past, count = docs.read(state.u).to(rows.dtype), docs.read(state.count, 0)
        refuse_overflow(count + docs.length > P, P)
        at = torch.arange(P + L, device=rows.device)
        index = (count[:, None] + at[:L])[..., None].expand_as(rows)
        # Filled, not multiplied: what follows a document in its row may hold inf.
        new = rows.masked_fill((at[:L] >= docs.length[:, None])[..., None], 0)
        every = torch.cat((past, past.new_zeros(new.shape)), dim=1).scatter(1, index, new)
        h = filter(P + L)
        if L <= FEW:
            done = []
            for j in range(L):
                lag = count[:, None] + j - at
                seen = h[lag.clamp_min(0)].masked_fill((lag < 0)[..., None], 0)
                done.append((seen * every).sum(1))
            y = torch.stack(done, 1) if done else rows
        else:
            y = long_conv(every, h).gather(1, index)
        after = docs.write(state, u=every[:, :P], count=count + docs.length)
        return docs.pack(y), after

    def initial_state(self, n: int, max_len: int) -> History:
        u = self.zeros(n, max_len, self.width, dtype=self.like.dtype)
        return History(u, self.zeros(n, dtype=torch.long))


class Hyena(Mixer):
    """``out(c * (h conv (b * v) + d (b * v)))``: the Hyena recurrence of order 2.

    b, c, v are short convolutions of projections, the filter h is a small sine network of the lag
    times a decay by channel.

    The lag is measured in ``filter_length`` tokens, so that h is defined at any lag. Serving keeps
    the convolution's inputs, as attention keeps keys: a step costs the length so far.

    Source: Poli et al. 2023 (arXiv:2302.10866), definition 3.1 and section 3.3 (implicit filters,
    window); order 2.
    """

    def __init__(self, d_model: int, config: HyenaConfig, linear: LinearFactory):
        super().__init__()
        self.config = c = config
        self.width = W = config.width or d_model
        self.inner = linear(d_model, 3 * W, "inner")
        self.out = linear(W, d_model, "out")
        self.conv = ShortConv(3 * W, c.conv_size)
        self.long = LongConv(W)
        features, hidden = 1 + 2 * c.bands, c.filter_width
        self.first = nn.Parameter(torch.empty(features, hidden))
        self.second = nn.Parameter(torch.empty(hidden, hidden))
        self.last = nn.Parameter(torch.empty(hidden, W))
        self.phase = nn.Parameter(torch.empty(2, hidden))
        self.frequency = nn.Parameter(torch.empty(2, hidden))
        self.decay = nn.Parameter(torch.empty(W))  # log of e-foldings in filter_length tokens
        self.skip = nn.Parameter(torch.empty(W))

    def init_weights(self) -> None:
        for matrix in (self.first, self.second, self.last):
            nn.init.normal_(matrix, std=matrix.shape[0] ** -0.5)
        nn.init.zeros_(self.phase)
        nn.init.constant_(self.frequency, 10.0)  # the paper's: sines of many periods
        with torch.no_grad():
            # The slowest channel falls to 1 % over filter_length tokens, the fastest over a fifth.
            rate = torch.linspace(-math.log(1e-2), -5 * math.log(1e-2), self.width)
            self.decay.copy_(rate.log())
        nn.init.ones_(self.skip)

    def filter(self, lags: int) -> Tensor:
        """`(F, W)` values of h at 0, 1, .., F - 1 tokens ago, float32 or wider."""
        wide = torch.promote_types(self.first.dtype, torch.float32)
        t = torch.arange(lags, device=self.first.device, dtype=wide) / self.config.filter_length
        bands = torch.arange(1, self.config.bands + 1, device=t.device, dtype=wide)
        turn = 2 * math.pi * t[:, None] * bands
        z = torch.cat((t[:, None], turn.cos(), turn.sin()), dim=-1)
        for i, matrix in enumerate((self.first, self.second)):
            z = (self.frequency[i].to(wide) * (z @ matrix.to(wide) + self.phase[i].to(wide))).sin()
        window = (-t[:, None] * self.decay.to(wide).exp()).exp()
        return z @ self.last.to(wide) * window * self.config.filter_length**-0.5

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        tail, history = parts_of(state, 2)
        u, tail = self.conv(self.inner(x_BTD, ctx), ctx, tail)
        b, c, v = u.chunk(3, dim=-1)
        u = (b * v).to(torch.promote_types(v.dtype, torch.float32))
        y, history = self.long(u, self.filter, ctx, history)
        y = y + self.skip.to(u.dtype) * u
        return Out(self.out(c * y.to(c.dtype), ctx), join_parts(tail, history))


@MIXERS.register("hyena")
class HyenaConfig(LayerConfig):
    """Implicit long convolution between gates, by FFT."""

    kind: Literal["hyena"] = "hyena"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    width: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    conv_size: Annotated[int, Field(gt=1, description="of the short convolution")] = 3
    filter_length: int = Field(default=1024, gt=0, description="tokens; unit of the filter's lag")
    filter_width: Annotated[int, Field(gt=0, description="of the filter's network")] = 64
    bands: Annotated[int, Field(gt=0, description="sines and cosines of the lag")] = 8

    layer = Hyena
    small = {"width": 6, "filter_length": 8, "filter_width": 4, "bands": 2}
