"""Rotary positions on several axes. B rows, T tokens, A axes, H heads, K head width."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.layout import Fields
from mm.model.positions.base import Position
from mm.model.positions.rope import turn, turn_normed
from mm.registry import POSITIONS


class RopeAxes(Position):
    """Rotate pairs (i, i + K/2) by the place on the axis of their section.

    ``ladder`` "joint": pair i turns as in one axis, so early sections turn fast and late ones
    slowly; "own": each section begins anew with the fastest. A document that lacks an axis uses
    axis 0: with one axis, "joint" is `rope`.

    Source: joint: M-RoPE of Wang et al. 2024, Qwen2-VL (arXiv:2409.12191), section 2.1 (frames,
    rows, columns), and Zhang et al. 2024, HiRoPE (arXiv:2403.19115), section 3 (fast pairs by the
    token's place in its function, slow ones by the function; its window of plain positions is a
    second set of scores and is not here); own: axial, Heo et al. 2024 (arXiv:2403.13298), eq. 6-7.
    """

    def __init__(self, theta: float, axes: list[int], pairs: list[int], ladder: str):
        self.theta, self.axes, self.pairs, self.ladder = theta, axes, pairs, ladder
        self.key = f"rope_axes.{theta}.{axes}.{pairs}.{ladder}"

    def prepare(self, f: Fields) -> Tensor:
        """`(2, B, T, 1, K/2)` float32 cosines and sines (float64 angles: exact far out)."""
        count = lambda n: torch.arange(n, device=f.position.device, dtype=torch.float64)
        if self.ladder == "joint":
            share = count(sum(self.pairs)) / sum(self.pairs)
        else:
            share = torch.cat([count(n) / n for n in self.pairs])
        A = f.position.shape[-1]
        places = torch.cat(
            [
                f.position[..., a if a < A else 0, None].expand(-1, -1, n)
                for a, n in zip(self.axes, self.pairs, strict=True)
            ],
            dim=-1,
        )
        angle = (places.to(torch.float64) * self.theta**-share)[:, :, None]
        return torch.stack((angle.cos(), angle.sin())).to(torch.float32)

    def apply(self, x: Tensor, prepared: Tensor) -> Tensor:
        return turn(x, prepared)

    def apply_normed(self, x: Tensor, norm: nn.Module, prepared: Tensor) -> Tensor:
        return turn_normed(x, norm, prepared)


@POSITIONS.register("rope_axes")
class RopeAxesConfig(Config):
    """Rotary positions on several axes: n-D grids, hierarchies."""

    kind: Literal["rope_axes"] = "rope_axes"
    theta: Annotated[float, Field(gt=1, le=1e12)] = 10000.0
    axes: list[int] = Field(
        default=[0, 1], min_length=1, description="axis of each section; 0 is time"
    )
    pairs: list[int] | None = Field(
        default=None, description="pairs of each section; default: equal shares"
    )
    ladder: Literal["joint", "own"] = Field(
        default="joint", description="one ladder of frequencies, or one a section"
    )

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> RopeAxes:
        half, n = head_dim // 2, len(self.axes)
        pairs = self.pairs or [half // n + (i < half % n) for i in range(n)]
        if head_dim % 2 or len(pairs) != n or sum(pairs) != half or min(pairs) < 1:
            raise ValueError(
                f"rope_axes: pairs {pairs} for axes {self.axes} must sum to head_dim / 2 ="
                f" {head_dim / 2}, at least one each"
            )
        return RopeAxes(self.theta, self.axes, pairs, self.ladder)
