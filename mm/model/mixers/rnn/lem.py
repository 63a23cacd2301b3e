"""Long expressive memory.

R rows of one document, W width.
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


class LEM(Cell):
    """Two coupled states with learned time steps. Sequential.

    ``z_t = (1 - d) z_{t-1} + d tanh(W_z y_{t-1} + V_z x_t)``, ``y_t = (1 - e) y_{t-1} + e tanh(W_y
    z_t + V_y x_t)`` with ``d, e = step * sigmoid(W y_{t-1} + V x_t)``; all with biases. State: y,
    z.

    Source: Rusch et al. 2022 (arXiv:2110.04744), section 2, the discretised form.
    """

    def __init__(self, d_model: int, config: LEMConfig, linear: LinearFactory):
        width = config.width or d_model
        super().__init__(width, 2 * width)
        self.dt = config.dt
        self.inner = linear(d_model, 4 * width, "inner")  # d, e, z, y
        self.bias = nn.Parameter(torch.empty(4 * width))
        self.from_y = nn.Parameter(torch.empty(3 * width, width))
        self.from_z = nn.Parameter(torch.empty(width, width))
        self.out = linear(width, d_model, "out")

    def init_weights(self) -> None:
        nn.init.zeros_(self.bias)
        bound = self.width**-0.5
        nn.init.uniform_(self.from_y, -bound, bound)
        nn.init.uniform_(self.from_z, -bound, bound)

    def inputs(self, x_RLD: Tensor) -> Sequence[Tensor]:
        u = self.inner(x_RLD).to(self.memory.dtype)
        return (u + self.bias.to(u)).split((3 * self.width, self.width), -1)

    def step(self, read: Sequence[Tensor], before_RS: Tensor) -> Tensor:
        y, z = before_RS.chunk(2, -1)
        d, e, slow = (read[0] + F.linear(y, self.from_y.to(y))).chunk(3, -1)
        z = torch.lerp(z, slow.tanh(), self.dt * d.sigmoid())
        fast = (read[1] + F.linear(z, self.from_z.to(z))).tanh()
        return torch.cat((torch.lerp(y, fast, self.dt * e.sigmoid()), z), -1)


@MIXERS.register("lem")
class LEMConfig(LayerConfig):
    """Long expressive memory: two states with learned time steps, sequential."""

    kind: Literal["lem"] = "lem"
    width: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    dt: Annotated[float, Field(gt=0, le=1, description="largest time step")] = 1.0

    layer = LEM
    small = {"width": 6}
