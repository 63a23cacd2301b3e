"""Griffin's recurrent block. B rows, T tokens, D model, W recurrent width, N slots, R rows, L their
length, C conv size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.causal_conv import causal_conv
from mm.kernels.glu import glu
from mm.kernels.linear_scan import linear_scan
from mm.kernels.rg_lru import rg_lru_gates
from mm.layout import Layout
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.varlen import PackedRows
from mm.registry import MIXERS
from mm.state import DataclassState, State

SHARPNESS = 8.0  # the constant c of the paper


@dataclass(frozen=True)
class Recurrent(DataclassState):
    """Hidden state and the convolution's last inputs."""

    h: Tensor  # (N, W) float32 or wider
    tail: Tensor  # (N, C - 1, W)

    def accept(self, n_N: Tensor) -> Recurrent:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> Recurrent:
        return self


@dataclass(frozen=True)
class DraftRecurrent(DataclassState):
    """Every state that a draft call passed through: index n is the state after n of its tokens."""

    h: Tensor  # (N, L + 1, W)
    inputs: Tensor  # (N, C - 1 + L, W) the old tail, then the call's convolution inputs
    length: Tensor  # (N,)

    def accept(self, n_N: Tensor) -> Recurrent:
        n = torch.minimum(n_N.to(self.length), self.length)
        return Recurrent(*_after(self.h, self.inputs, n))

    def commit(self) -> Recurrent:
        return self.accept(self.length)


def _after(h: Tensor, inputs: Tensor, n_N: Tensor) -> tuple[Tensor, Tensor]:
    """State after ``n_N`` tokens, from all states `(N, L + 1, W)` and the tail with the inputs `(N,
    C - 1 + L, W)`.
    """
    conv_size = inputs.shape[1] - (h.shape[1] - 1)
    W = h.shape[-1]
    places = n_N[:, None] + torch.arange(conv_size, device=n_N.device)
    tail = inputs.gather(1, places[..., None].expand(-1, -1, W))
    return h.gather(1, n_N[:, None, None].expand(-1, 1, W))[:, 0], tail


class RGLRU(Mixer):
    """``out(gelu(gate(x)) * rg_lru(conv(in(x))))`` with block-diagonal recurrence and input gates.

    Source: De et al. 2024, Griffin (arXiv:2402.19427), section 2.4, eq. 1-4 and appendix A.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, width: int, heads: int, conv_size: int, linear: LinearFactory):
        super().__init__()
        self.width, self.heads, self.conv_size = width, heads, conv_size
        self.inner = linear(d_model, 2 * width, "inner")
        self.out = linear(width, d_model, "out")
        self.conv_weight = nn.Parameter(torch.empty(conv_size, width))
        self.conv_bias = nn.Parameter(torch.empty(width))
        self.gate_weight = nn.Parameter(torch.empty(heads, width // heads, 2 * width // heads))
        self.gate_bias = nn.Parameter(torch.empty(heads, 2 * width // heads))
        self.decay = nn.Parameter(torch.empty(width))

    def init_weights(self) -> None:
        nn.init.normal_(self.conv_weight, std=self.conv_size**-0.5)
        nn.init.zeros_(self.conv_bias)
        nn.init.normal_(self.gate_weight, std=self.gate_weight.shape[1] ** -0.5)
        nn.init.zeros_(self.gate_bias)
        with torch.no_grad():
            # a ** c uniform in [0.9, 0.999]: softplus(decay) = -log(a ** c) / c
            rate = (
                -torch.empty_like(self.decay, dtype=torch.float32).uniform_(0.9, 0.999).log()
                / SHARPNESS
            )
            self.decay.copy_(rate.expm1().log())

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        gate, u = self.inner(x_BTD, ctx).chunk(2, dim=-1)
        if state is None:
            h, after = self._forward_full(u, ctx.layout), None
        else:
            assert isinstance(state, Recurrent | DraftRecurrent)
            h, after = self._forward_cached(u, ctx, state.commit())
        return Out(self.out(glu(gate, h, "gelu_tanh"), ctx), after)

    def _forward_full(self, u: Tensor, layout: Layout) -> Tensor:
        """States of documents that all begin here."""
        document = layout.fields.document
        y = causal_conv(u, self.conv_weight, self.conv_bias, document)
        reset = (
            F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True) if u.shape[1] else None
        )
        a, b = self._gates(y)
        return linear_scan(a, b, reset)[0]

    def _forward_cached(
        self, u: Tensor, ctx: Ctx, state: Recurrent
    ) -> tuple[Tensor, Recurrent | DraftRecurrent]:
        """States of documents that go on from their slots."""
        B, T = u.shape[:2]
        docs = PackedRows.of(ctx.layout, state.h.shape[0])
        rows = docs.unpack(u)
        inputs = torch.cat((docs.read(state.tail).to(rows.dtype), rows), dim=1)
        # The tail is the document's own past here: the convolution needs no borders, and its first
        # outputs are the tail's.
        y = causal_conv(
            inputs,
            self.conv_weight,
            self.conv_bias,
            torch.ones_like(inputs[..., 0], dtype=torch.int32),
        )
        a, b = self._gates(y[:, self.conv_size - 1 :])
        before = docs.read(state.h)
        h, _ = linear_scan(a, b, None, before)
        w = docs.written(state.h.shape[0])
        # A slot that nobody writes keeps its state, as one that a row of length 0 wrote.
        states = torch.cat(
            (torch.where(w.hit[:, None], w.take(before), state.h)[:, None], w.take(h)), dim=1
        )
        tails = w.take(inputs).to(state.tail.dtype)
        old = torch.where(w.hit[:, None, None], tails[:, : self.conv_size - 1], state.tail)
        drafted = DraftRecurrent(
            states.to(state.h.dtype),
            torch.cat((old, tails[:, self.conv_size - 1 :]), dim=1),
            w.length,
        )
        return docs.pack(h, B, T), drafted if ctx.draft else drafted.commit()

    def _gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Decay and input of the recurrence, float32 or wider. ``u`` `(R, L, W)`."""
        R, L, W = u.shape
        heads = u.reshape(R * L, self.heads, W // self.heads).transpose(0, 1)
        gates = torch.bmm(heads, self.gate_weight.to(u.dtype))
        rate = SHARPNESS * F.softplus(self.decay.to(torch.promote_types(u.dtype, torch.float32)))
        a, b = rg_lru_gates(gates, self.gate_bias, rate, u.reshape(R * L, W).to(gates.dtype))
        return a.view(R, L, W), b.view(R, L, W)

    def initial_state(self, n: int, max_len: int) -> Recurrent:
        like = self.decay.detach()
        wide = torch.promote_types(like.dtype, torch.float32)
        return Recurrent(
            like.new_zeros(n, self.width, dtype=wide),
            like.new_zeros(n, self.conv_size - 1, self.width, dtype=like.dtype),
        )

    def state_bytes(self, n: int, max_len: int) -> int:
        item = self.decay.element_size()
        return n * self.width * (max(item, 4) + (self.conv_size - 1) * item)


@MIXERS.register("rg_lru")
class RGLRUConfig(Config):
    """Real-gated linear recurrent unit in Griffin's block."""

    kind: Literal["rg_lru"] = "rg_lru"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    width: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    heads: Annotated[int, Field(gt=0, description="blocks of the block-diagonal gates")] = 4
    conv_size: Annotated[int, Field(gt=1, description="width of the causal convolution")] = 4

    def build(self, d_model: int, linear: LinearFactory = dense) -> RGLRU:
        width = self.width or d_model
        if width % self.heads:
            raise ValueError(f"rg_lru: width {width} is not a multiple of heads {self.heads}")
        return RGLRU(d_model, width, self.heads, self.conv_size, linear)

    @classmethod
    def smallest(cls) -> RGLRUConfig:
        return cls(heads=2)
