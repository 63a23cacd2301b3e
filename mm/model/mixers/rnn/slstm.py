"""sLSTM: a scalar LSTM with exponential gates.

R rows of one document, L their length, W width, H heads, K their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.model.layer import LinearFactory
from mm.model.layer_config import LayerConfig
from mm.model.mixers.rnn.base import Cell
from mm.registry import MIXERS

EPS = 1e-6  # of the norm


class SLSTM(Cell):
    """A scalar LSTM with exponential gates, mixed within heads. Sequential.

    ``c_t = f c_{t-1} + i z``, ``n_t = f n_{t-1} + i``, ``h_t = o c_t / n_t``, ``i = e^{~i}``, ``f =
    sigmoid(~f)``, ``z = tanh(~z)``, ``o = sigmoid(~o)``; each ``~`` reads ``x_t`` and, within its
    head, ``h_{t-1}``. Then a layer norm by head.

    c and n are kept divided by ``exp(m_t)``, ``m_t = max(log f + m_{t-1}, ~i)``; h does not depend
    on m, so no gradient is lost with it. State: h, c, n, m.

    Source: Beck et al. 2024, xLSTM (arXiv:2405.04517), section 2.2, eq. 8-17.
    """

    def __init__(self, d_model: int, config: SLSTMConfig, linear: LinearFactory):
        width, heads = config.width or d_model, config.heads
        if width % heads:
            raise ValueError(f"slstm: width {width} is not a multiple of heads {heads}")
        super().__init__(width, 4 * width)
        self.heads = heads
        K = width // heads
        self.gates = linear(d_model, 4 * width, "gates")
        self.recurrent = nn.Parameter(torch.empty(heads, K, 4 * K))
        self.bias = nn.Parameter(torch.empty(heads, 4, K))  # input, forget, candidate, output
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.out = linear(width, d_model, "out")

    def init_weights(self) -> None:
        nn.init.zeros_(self.recurrent)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.norm_weight)
        with torch.no_grad():
            K = self.width // self.heads
            # Open at first, some units longer than others.
            self.bias[:, 1] = torch.linspace(3.0, 6.0, K)

    def inputs(self, x_RLD: Tensor) -> Sequence[Tensor]:
        (R, L), K = x_RLD.shape[:2], self.width // self.heads
        gates = self.gates(x_RLD).to(self.memory.dtype).view(R, L, self.heads, 4, K)
        return (gates + self.bias.to(gates),)

    def step(self, read: Sequence[Tensor], before_RS: Tensor) -> Tensor:
        (gates,), R = read, before_RS.shape[0]
        h, c, n, m = before_RS.view(R, 4, self.heads, -1).unbind(1)
        moved = torch.bmm(h.transpose(0, 1), self.recurrent.to(h)).transpose(0, 1)
        i, f, z, o = (gates + moved.view_as(gates)).unbind(2)
        kept = F.logsigmoid(f)
        with torch.no_grad():
            peak = torch.where(n == 0, i, torch.maximum(kept + m, i))
        # Where n = 0 there is nothing to decay (and the exponent may be positive).
        f = (kept + m - peak).masked_fill(n == 0, -torch.inf).exp()
        i = (i - peak).exp()
        c, n = f * c + i * z.tanh(), f * n + i
        return torch.stack((o.sigmoid() * c / n, c, n, peak), 1).view(R, -1)

    def states(self, x_RLD: Tensor, before_RS: Tensor) -> tuple[Tensor, Tensor]:
        h, states = super().states(x_RLD, before_RS)
        heads = h.unflatten(-1, (self.heads, -1))
        normed = F.layer_norm(heads, heads.shape[-1:], eps=EPS).flatten(-2)
        return normed * self.norm_weight.to(normed), states


@MIXERS.register("slstm")
class SLSTMConfig(LayerConfig):
    """Scalar LSTM with exponential gates and memory mixing in heads (xLSTM), sequential in time."""

    kind: Literal["slstm"] = "slstm"
    width: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    heads: Annotated[int, Field(gt=0, description="blocks of the recurrent matrices")] = 4

    layer = SLSTM
    small = {"width": 6, "heads": 2}
