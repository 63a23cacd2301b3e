"""mLSTM: linear attention with an exponential input gate. B rows, T tokens, D model, H heads, K key
width, V value width, N slots, R rows of one document, L their length, C conv size, W convolved
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.linears.dense import dense
from mm.model.mixers.linear_attention.linear_attention import (
    EPS,
    LinearAttention,
    LinearAttentionConfig,
)
from mm.model.mixers.linear_attention.memory import DraftMatrix, Matrix
from mm.model.mixers.ssm.scan import DraftHidden, Hidden, advanced
from mm.model.varlen import PackedRows
from mm.registry import MIXERS
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Stabilised(DataclassState):
    """Matrix and normaliser divided by ``exp(peak)``, and the peak."""

    matrix: Matrix | DraftMatrix  # S (N, H, K, V + 1), the last column is the normaliser
    peak: Hidden | DraftHidden  # (N, H) float64

    def accept(self, n_N: Tensor) -> Stabilised:
        return Stabilised(self.matrix.accept(n_N), self.peak.accept(n_N))

    def commit(self) -> Stabilised:
        return Stabilised(self.matrix.commit(), self.peak.commit())


class MLSTM(LinearAttention):
    """``h_t = C_t^T q_t / max(|n_t q_t|, 1)``, ``C_t = f_t C_{t-1} + e^{i_t} k_t v_t^T``, ``n_t =
    f_t n_{t-1} + e^{i_t} k_t``; per head layer norm, sigmoid output gate.

    Everything is kept divided by ``exp(m_t)``, ``m_t = max(log f_t + m_{t-1}, i_t, 0)``: decays
    become ``log f_t + m_{t-1} - m_t``, keys are scaled by ``exp(i_t - m_t)``, the 1 becomes
    ``exp(-m_t)``, and no exponent is positive. The outputs do not depend on m, so no gradient is
    lost with it, and the chunkwise form is that of the `linear_attention` Op.

    Source: Beck et al. 2024, xLSTM (arXiv:2405.04517), section 2.3, eq. 19-27, stabiliser eq. 15
    (floored at zero here, where the normaliser's lower bound makes it harmless); block, soft-cap
    and initial biases: Beck et al. 2025, xLSTM 7B (arXiv:2503.13427), section 3.
    """

    def __init__(
        self,
        d_model: int,
        config: MLSTMConfig,
        inner: LinearAttentionConfig,
        key_dim: int,
        value_dim: int,
        linear: LinearFactory,
    ):
        super().__init__(d_model, inner, key_dim, value_dim, inner.position.build(key_dim), linear)
        self.cap, self.input_bias = config.soft_cap, config.input_bias
        self.gates = linear(d_model, 2 * self.heads, "gates")
        self.gate_bias = nn.Parameter(torch.empty(2 * self.heads))  # input gates, forget gates
        self.norm_weight = nn.Parameter(torch.empty(self.heads, value_dim))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.ones_(self.norm_weight)
        with torch.no_grad():
            self.gate_bias[: self.heads] = self.input_bias
            self.gate_bias[self.heads :] = torch.linspace(3.0, 6.0, self.heads)

    def features(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> dict[str, Tensor]:
        """Arguments of the Op and ``m`` `(B, T, H)` float64, by which they are stabilised."""
        assert state is None or isinstance(state, Stabilised)
        old = state.commit() if state is not None else None
        f = super().features(x_BTD, ctx, old.matrix if old is not None else None)
        raw = self.gates(x_BTD, ctx).to(f["v"]) + self.gate_bias.to(f["v"])
        if self.cap is not None:
            raw = self.cap * (raw / self.cap).tanh()
        i, kept = raw[..., : self.heads], F.logsigmoid(raw[..., self.heads :])
        docs = PackedRows.of(ctx.layout, 0 if old is None else old.peak.h.shape[0])
        with torch.no_grad():
            ri, rf = docs.unpack(i).double(), docs.unpack(kept).double()
            first = rf.new_zeros(rf.shape[0], self.heads)
            if old is not None:
                first = docs.read(old.peak.h)
            # m_t = F_t + max(m_0, max_{s <= t} (max(i_s, 0) - F_s)), F the sums of log f.
            total = rf.cumsum(1)
            lifted = torch.cat((first[:, None], ri.clamp_min(0) - total), dim=1)
            m = lifted.cummax(1).values[:, 1:] + total if rf.shape[1] else rf
            fall = torch.cat((first[:, None], m[:, :-1]), 1) - m if rf.shape[1] else m
            B, T = i.shape[:2]
            m, fall = docs.pack(m, B, T), docs.pack(fall, B, T)
        f["g"] = (kept + fall).to(kept.dtype)
        f["k"] = f["k"] * (i - m).exp().to(i.dtype)[..., None]
        return {**f, "m": m}

    def core(
        self, f: dict[str, Tensor], ctx: Ctx, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        q, k, v, g, m = f["q"], f["k"], f["v"], f["g"], f["m"]
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        after = None
        if state is None:
            o = self._forward_full(q, k, v, g, ctx)
        else:
            assert isinstance(state, Stabilised)
            old = state.commit()
            assert isinstance(old.matrix, Matrix) and isinstance(old.peak, Hidden)
            o, matrix = self._forward_cached(q, k, v, g, f.get("inputs"), ctx, old.matrix)
            docs = PackedRows.of(ctx.layout, old.peak.h.shape[0])
            peak = advanced(old.peak, docs, docs.read(old.peak.h), docs.unpack(m), ctx.draft)
            assert isinstance(peak, Hidden | DraftHidden)
            after = Stabilised(matrix, peak)
        return o[..., :-1] / self._bound(o[..., -1], m)[..., None], after

    @staticmethod
    def _bound(sums: Tensor, m: Tensor) -> Tensor:
        return torch.maximum(sums.abs(), (-m).exp().to(sums.dtype)) + EPS

    def attention_matrix(self, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        a = super().attention_matrix(f, ctx)
        return a / self._bound(a.sum(-1), f["m"].transpose(1, 2))[..., None]

    def _normed(self, o: Tensor) -> Tensor:
        return super()._normed(o) * self.norm_weight.to(o.dtype)

    def _state_shape(self) -> tuple[tuple[int, int, int], tuple[int, int]]:
        (H, K, V), tail = super()._state_shape()
        return (H, K, V + 1), tail

    def initial_state(self, n: int, max_len: int) -> Stabilised:  # type: ignore[override]
        matrix = super().initial_state(n, max_len)
        return Stabilised(matrix, Hidden(matrix.S.new_zeros(n, self.heads, dtype=torch.float64)))

    def state_bytes(self, n: int, max_len: int) -> int:
        return super().state_bytes(n, max_len) + n * self.heads * 8


@MIXERS.register("mlstm")
class MLSTMConfig(Config):
    """Matrix LSTM: parallel linear attention with exponential input gates (xLSTM)."""

    kind: Literal["mlstm"] = "mlstm"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    heads: Annotated[int, Field(gt=0)] = 4
    expand_key: Annotated[float, Field(gt=0, description="all heads' keys / d_model")] = 0.5
    expand_value: Annotated[float, Field(gt=0, description="all heads' values / d_model")] = 1.0
    soft_cap: Annotated[float, Field(gt=0, description="bound of the gates' logits")] | None = 15.0
    input_bias: Annotated[float, Field(description="what input gates begin as")] = -10.0
    conv_size: Annotated[int, Field(ge=0, description="of a short convolution; 0 = none")] = 0

    def build(self, d_model: int, linear: LinearFactory = dense) -> MLSTM:
        key_dim, value_dim = (
            self._share(d_model * expand / self.heads, d_model)
            for expand in (self.expand_key, self.expand_value)
        )
        inner = LinearAttentionConfig(
            heads=self.heads,
            feature="identity",
            normalise=False,
            scale=True,
            decay="none",  # ours comes with the input gate
            conv_size=self.conv_size,
            norm="layer",
            gate="sigmoid",
        )
        return MLSTM(d_model, self, inner, key_dim, value_dim, linear)

    def _share(self, width: float, d_model: int) -> int:
        if width != int(width) or width < 1:
            raise ValueError(
                f"mlstm: {self.heads} heads do not divide d_model {d_model} * expand_key "
                f"{self.expand_key} and * expand_value {self.expand_value}"
            )
        return int(width)

    @classmethod
    def smallest(cls) -> MLSTMConfig:
        return cls(heads=2, input_bias=0.0, conv_size=3)
