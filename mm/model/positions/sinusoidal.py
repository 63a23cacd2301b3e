"""Fixed absolute positions. B rows, T tokens, D model."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.layout import Fields
from mm.model.positions.base import Position
from mm.registry import POSITIONS


class Sinusoidal(Position):
    """Add sines (even channels) and cosines (odd ones) of ``position * theta ** (-2i / D)``.

    To the vectors of the embedder (the classical form), or to the input of one attention layer.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.
    """

    def __init__(self, theta: float):
        self.theta = theta

    def embed(self, x_BTD: Tensor, f: Fields) -> Tensor:
        D = x_BTD.shape[-1]
        even = torch.arange(0, D, 2, device=x_BTD.device, dtype=torch.float64)
        # float64 angles: exact far out
        angle = f.position[..., :1].to(torch.float64) * self.theta ** (-even / D)
        waves = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., :D]
        return x_BTD + waves.to(x_BTD.dtype)


@POSITIONS.register("sinusoidal")
class SinusoidalConfig(Config):
    """Sines and cosines."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    theta: Annotated[float, Field(gt=1)] = 10000.0

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> Sinusoidal:
        return Sinusoidal(self.theta)
