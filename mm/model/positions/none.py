"""No position at all: order is known from the causal mask alone.

B rows, T tokens, H heads, K head width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.layout import Fields
from mm.model.positions.base import Position
from mm.registry import POSITIONS


class Tempered(nn.Module, Position):
    """No positions, and logits times a number.

    One learned by head, and one that grows with the query's place ``n`` beyond ``trained`` tokens,
    ``max(1, log n / log trained)``.

    Source: temperature by head: Wang et al. 2024 (arXiv:2404.12224), section 4, tuned there with
    all other weights frozen; growth with length: Puvvada et al. 2025, SWAN (arXiv:2504.08719),
    section on scaling at inference, by the rule of Chiang & Cholak 2022 (arXiv:2202.12172) with
    the slope that is 1 at ``trained`` (SWAN fits its slope on long texts).
    """

    def __init__(self, heads: int, temperature: bool, trained: int | None):
        super().__init__()
        self.temperature = nn.Parameter(torch.empty(heads)) if temperature else None
        self.trained = trained

    def init_weights(self) -> None:
        if self.temperature is not None:
            nn.init.ones_(self.temperature)

    def rotate(self, q: Tensor, k: Tensor, fq: Fields, fk: Fields) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        y = q.to(wide)
        if self.temperature is not None:
            y = y * self.temperature.to(wide)[:, None]
        if self.trained is not None:
            n = (fq.position[..., 0] + 1).to(wide)
            y = y * (n.log() / math.log(self.trained)).clamp_min(1)[:, :, None, None]
        return y.to(q.dtype), k


@POSITIONS.register("none")
class NoPositionConfig(Config):
    """Attention without positions. Source: Kazemnejad et al. 2023 (arXiv:2305.19466)."""

    kind: Literal["none"] = "none"
    temperature: bool = Field(default=False, description="a learned factor of the logits by head")
    trained: int | None = Field(
        default=None, gt=1, description="tokens beyond which logits grow with log n"
    )

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> Position:
        if self.temperature or self.trained:
            return Tempered(heads, self.temperature, self.trained)
        return Position()
