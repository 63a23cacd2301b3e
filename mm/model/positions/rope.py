"""Rotary positions. B rows, T tokens, H heads, K head width."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mm.config import Config
from mm.layout import Fields
from mm.model.layer import Position
from mm.registry import POSITIONS


class Rope(Position):
    """Rotate pairs (i, i + K/2) of a head by ``position * theta ** (-2i / K)``.

    Source: Su et al. 2021 (arXiv:2104.09864), eq. 34, in the half-split order of GPT-NeoX.
    """

    def __init__(self, head_dim: int, theta: float):
        self.key = f"rope.{theta}.{head_dim}"
        self.head_dim, self.theta = head_dim, theta

    def prepare(self, f: Fields) -> Tensor:
        """`(2, B, T, 1, K/2)` float32 cosines and sines of every place (float64 angles: exact far
        out).
        """
        half = (
            torch.arange(0, self.head_dim, 2, device=f.position.device, dtype=torch.float64)
            / self.head_dim
        )
        angle = f.position[:, :, :1, None].to(torch.float64) * self.theta**-half
        return torch.stack((angle.cos(), angle.sin())).to(torch.float32)

    def apply(self, x: Tensor, prepared: Tensor) -> Tensor:
        cos, sin = prepared.to(torch.promote_types(x.dtype, torch.float32))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    def rotate(self, q: Tensor, k: Tensor, fq: Fields, fk: Fields) -> tuple[Tensor, Tensor]:
        return self.apply(q, self.prepare(fq)), self.apply(k, self.prepare(fk))


@POSITIONS.register("rope")
class RopeConfig(Config):
    """Rotary positions on axis 0 (time)."""

    kind: Literal["rope"] = "rope"
    theta: float = 10000.0

    def build(self, head_dim: int) -> Rope:
        if head_dim % 2:
            raise ValueError(f"rope rotates pairs: head_dim {head_dim} is odd")
        return Rope(head_dim, self.theta)
