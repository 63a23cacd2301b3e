"""mLSTM: linear attention with an exponential input gate.

B rows, T tokens, D model, H heads, K key width, V value width, N slots.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.linear_attention import linear_attention
from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.layer_config import LayerConfig
from mm.model.mixers.linear_attention.linear_attention import (
    EPS,
    LinearAttention,
    LinearAttentionConfig,
    append_ones,
)
from mm.model.mixers.linear_attention.memory import MatrixMemory
from mm.model.mixers.ssm.scan import Hidden, RecurrentState
from mm.model.sequence import Link
from mm.model.stateful import Stateful
from mm.model.varlen import PackedRows
from mm.registry import MIXERS
from mm.state import State, join_parts, parts_of


class Peak(RecurrentState):
    """Keeps ``m_t = max(log f_t + m_{t-1}, i_t, 0)`` of each head, float64."""

    def __init__(self, heads: int):
        super().__init__(heads, dtype=torch.float64)

    @torch.no_grad()
    def forward(
        self, i_BTH: Tensor, f_BTH: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, Tensor, Hidden | None]:
        """``m_t`` and ``m_{t-1} - m_t``, `(B, T, H)`, and the State after the call.

        Args:
            i_BTH: input gates; f_BTH: forget gates; logarithms of both.
        """

        def run(docs: PackedRows, first: Tensor) -> tuple[Tensor, Tensor]:
            i, f = docs.unpack(i_BTH).double(), docs.unpack(f_BTH).double()
            # m_t = F_t + max(m_0, max_{s <= t} (max(i_s, 0) - F_s)), F the sums of log f.
            total = f.cumsum(1)
            lifted = torch.cat((first[:, None], i.clamp_min(0) - total), dim=1)
            m = lifted.cummax(1).values[:, 1:] + total
            fall = torch.cat((first[:, None], m[:, :-1]), 1)[:, : m.shape[1]] - m
            return torch.stack((m, fall), 2), docs.last(m, first)

        def fresh() -> Tensor:
            docs = PackedRows.of(ctx.layout, 0)
            return docs.pack(run(docs, self.begin(len(docs.length)))[0])

        if state is None:
            highest = lambda total, before, own: torch.maximum(total + before, own)
            link = Link(highest, lambda: f_BTH.double().sum(1), self.shape)
            both, after = self.across(fresh, run, ctx, lambda: link), None
        else:
            both, after = self.advance(run, ctx, state)
        m, fall = both.unbind(2)
        return m, fall, after


class StabilisedMemory(Stateful):
    """A `MatrixMemory` of values and their normaliser, divided by ``exp(m)``, and m (`MLSTM`)."""

    def __init__(self, heads: int, key_dim: int, value_dim: int):
        super().__init__()
        self.matrix, self.peak = MatrixMemory(heads, key_dim, value_dim + 1), Peak(heads)

    def forward(
        self, f: dict[str, Tensor], ctx: Ctx, state: State | None
    ) -> tuple[Tensor, Tensor, State | None]:
        """Sums of values and weights `(B, T, H, V + 1)`; m `(B, T, H)`; the State after."""
        matrix, peak = parts_of(state, 2)
        f, m, peak = self.stabilise(f, ctx, peak)
        parts = (f["q"], f["k"], append_ones(f["v"]), f["g"])
        o, matrix = self.matrix(linear_attention, parts, ctx, matrix)
        return o, m, join_parts(matrix, peak)

    def stabilise(
        self, f: dict[str, Tensor], ctx: Ctx, state: State | None = None
    ) -> tuple[dict[str, Tensor], Tensor, State | None]:
        """Features with keys ``k`` and log decays ``g`` in units of ``exp(m)``; m; its State."""
        m, fall, after = self.peak(f["input"], f["forget"], ctx, state)
        g = (f["forget"] + fall).to(f["forget"].dtype)
        k = f["k"] * (f["input"] - m).exp().to(f["input"].dtype)[..., None]
        return {**f, "k": k.to(f["k"].dtype), "g": g}, m, after


class MLSTM(LinearAttention):
    """``h_t = C_t^T q_t / max(|n_t q_t|, 1)``, ``C_t = f_t C_{t-1} + e^{i_t} k_t v_t^T``.

    ``n_t = f_t n_{t-1} + e^{i_t} k_t``; per head layer norm, sigmoid output gate. Everything is
    kept divided by ``exp(m_t)``, ``m_t = max(log f_t + m_{t-1}, i_t, 0)``: decays become ``log f_t
    + m_{t-1} - m_t``, keys are scaled by ``exp(i_t - m_t)``, the 1 becomes ``exp(-m_t)``, and no
    exponent is positive. The outputs do not depend on m, so no gradient is lost with it, and the
    chunkwise form is that of the `linear_attention` Op.

    Source: Beck et al. 2024, xLSTM (arXiv:2405.04517), section 2.3, eq. 19-27, stabiliser eq. 15
    (floored at zero here, where the normaliser's lower bound makes it harmless); block, soft-cap
    and initial biases: Beck et al. 2025, xLSTM 7B (arXiv:2503.13427), section 3.
    """

    def __init__(self, d_model: int, config: MLSTMConfig, linear: LinearFactory):
        inner = LinearAttentionConfig(
            heads=config.heads,
            expand_key=config.expand_key,
            expand_value=config.expand_value,
            feature="identity",
            normalise=False,
            scale=True,
            decay="none",  # ours comes with the input gate
            conv_size=config.conv_size,
            norm="layer",
            gate="sigmoid",
        )
        super().__init__(d_model, inner, linear)
        key_dim, value_dim = self.key_dim, self.value_dim
        self.cap, self.input_bias = config.soft_cap, config.input_bias
        conv = self.conv
        del self.conv, self.memory
        self.gates = linear(d_model, 2 * self.heads, "gates")
        # Parts of the State, in order; weights of the convolution are drawn after the gates'.
        self.conv, self.memory = conv, StabilisedMemory(self.heads, key_dim, value_dim)
        self.gate_bias = nn.Parameter(torch.empty(2 * self.heads))  # input gates, forget gates
        self.norm_weight = nn.Parameter(torch.empty(self.heads, value_dim))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.ones_(self.norm_weight)
        with torch.no_grad():
            self.gate_bias[: self.heads] = self.input_bias
            self.gate_bias[self.heads :] = torch.linspace(3.0, 6.0, self.heads)

    def features(
        self, x_BTD: Tensor, ctx: Ctx, state: State | None = None
    ) -> tuple[dict[str, Tensor], State | None]:
        """Queries, keys and values, and the gates' logarithms ``input``, ``forget`` `(B, T, H)`."""
        f, after = super().features(x_BTD, ctx, state)
        wide = torch.promote_types(f["v"].dtype, torch.float32)
        raw = self.gates(x_BTD, ctx).to(wide) + self.gate_bias.to(wide)
        if self.cap is not None:
            raw = self.cap * (raw / self.cap).tanh()
        i, forget = raw[..., : self.heads], F.logsigmoid(raw[..., self.heads :])
        return {**f, "input": i, "forget": forget}, after

    def core(
        self, f: dict[str, Tensor], ctx: Ctx, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        o, m, after = self.memory(f, ctx, state)
        return o[..., :-1] / self._bound(o[..., -1], m)[..., None], after

    @staticmethod
    def _bound(sums: Tensor, m: Tensor) -> Tensor:
        return torch.maximum(sums.abs(), (-m).exp().to(sums.dtype)) + EPS

    def attention_matrix(self, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        f, m, _ = self.memory.stabilise(f, ctx)
        a = super().attention_matrix(f, ctx)
        return a / self._bound(a.sum(-1), m.transpose(1, 2))[..., None]

    def _normed(self, o: Tensor) -> Tensor:
        return super()._normed(o) * self.norm_weight.to(o.dtype)


@MIXERS.register("mlstm")
class MLSTMConfig(LayerConfig):
    """Matrix LSTM: parallel linear attention with exponential input gates (xLSTM)."""

    kind: Literal["mlstm"] = "mlstm"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    heads: Annotated[int, Field(gt=0)] = 4
    expand_key: Annotated[float, Field(gt=0, description="all heads' keys / d_model")] = 0.5
    expand_value: Annotated[float, Field(gt=0, description="all heads' values / d_model")] = 1.0
    soft_cap: Annotated[float, Field(gt=0, description="bound of the gates' logits")] | None = 15.0
    input_bias: Annotated[float, Field(description="what input gates begin as")] = -10.0
    conv_size: Annotated[int, Field(ge=0, description="of a short convolution; 0 = none")] = 0

    layer = MLSTM
    small = {"heads": 2, "input_bias": 0.0, "conv_size": 3}
