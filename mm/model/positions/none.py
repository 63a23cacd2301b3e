"""No position at all: order is known from the causal mask alone."""

from __future__ import annotations

from typing import Literal

from mm.config import Config
from mm.model.layer import Position
from mm.registry import POSITIONS


@POSITIONS.register("none")
class NoPositionConfig(Config):
    """Attention without positions. Source: Kazemnejad et al. 2023 (arXiv:2305.19466)."""

    kind: Literal["none"] = "none"

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> Position:
        return Position()
