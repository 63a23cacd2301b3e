"""A gated cell with a polynomial memory of its past.

R rows of one document, W width, N states.
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
from mm.model.mixers.ssm.hippo_matrices import hippo
from mm.registry import MIXERS


class HiPPORNN(Cell):
    """A gated recurrent cell that reads the polynomial memory of its own past. Sequential.

    ``h_t = (1 - g) h_{t-1} + g tanh(u)``, where gate and update read ``x_t``, ``h_{t-1}`` and the
    memory ``c_{t-1}``; ``f_t = w . h_t + b``; ``c_t = A_t c_{t-1} + B_t f_t`` with the bilinear
    HiPPO-LegS matrices at step 1 / t.

    c holds the coefficients of the best polynomial for f over all of the document, whatever its
    length, so gradients to the past fade like 1 / t. State: h, c, t.

    Source: Gu et al. 2020, HiPPO (arXiv:2008.07669), section 2.4 and theorem 2.
    """

    def __init__(self, d_model: int, config: HiPPORNNConfig, linear: LinearFactory):
        width, states = config.width or d_model, config.states
        super().__init__(width, width + states + 1)
        self.orders = states
        self.inner = linear(d_model, 2 * width, "inner")  # gate, update
        self.bias = nn.Parameter(torch.empty(2 * width))
        self.recurrent = nn.Parameter(torch.empty(2 * width, width + states))
        self.signal = nn.Parameter(torch.empty(width))
        self.signal_bias = nn.Parameter(torch.empty(1))
        self.out = linear(width, d_model, "out")

    def init_weights(self) -> None:
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.signal_bias)
        bound = (self.width + self.orders) ** -0.5
        nn.init.uniform_(self.recurrent, -bound, bound)
        nn.init.normal_(self.signal, std=self.width**-0.5)

    def inputs(self, x_RLD: Tensor) -> Sequence[Tensor]:
        u = self.inner(x_RLD).to(self.memory.dtype)
        return (u + self.bias.to(u),)

    def step(self, read: Sequence[Tensor], before_RS: Tensor) -> Tensor:
        h, c, t = before_RS.split((self.width, self.orders, 1), -1)
        gate, update = (read[0] + F.linear(torch.cat((h, c), -1), self.recurrent.to(h))).chunk(
            2, -1
        )
        h = torch.lerp(h, update.tanh(), gate.sigmoid())
        f = (h * self.signal.to(h)).sum(-1, keepdim=True) + self.signal_bias.to(h)
        t = t + 1
        a, b = (m.to(h) for m in hippo("legs", self.orders))
        ahead = c + F.linear(c, a) / (2 * t) + f / t * b
        # LegS is lower triangular: the implicit half of the step is a substitution.
        system = torch.eye(self.orders, dtype=h.dtype, device=h.device) - a / (2 * t[..., None])
        c = torch.linalg.solve_triangular(system, ahead[..., None], upper=False)[..., 0]
        return torch.cat((h, c, t), -1)


@MIXERS.register("hippo_rnn")
class HiPPORNNConfig(LayerConfig):
    """Gated recurrent cell with a HiPPO-LegS memory, sequential."""

    kind: Literal["hippo_rnn"] = "hippo_rnn"
    width: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    states: Annotated[int, Field(gt=0, description="coefficients of the memory")] = 64

    layer = HiPPORNN
    small = {"width": 6, "states": 4}
