"""Weights of -1, 0 and 1, and activations of eight bits, as they are trained."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Linear
from mm.registry import LINEARS

EPS = 1e-5  # least scale of weights and of a token's activations


class Ternary(Linear):
    """A matrix that is rounded to three values, times one scale, in every forward.

    The full-precision weight is what learns: gradients pass both roundings as they are (straight
    through).

    Source: Ma et al. 2024, "The Era of 1-bit LLMs" (arXiv:2402.17764), section 2, eq. 1-3: weights
    by their mean magnitude, activations of a token by its largest, both ways from zero. The norm
    before: SubLN of Wang et al. 2023, BitNet (arXiv:2310.11453), section 2.1, without a gain.
    """

    exact = False

    def __init__(self, d_in: int, d_out: int, name: str = "", norm: bool = True):
        super().__init__()
        self.name, self.norm = name, norm
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def rescale(self, factor: float) -> None:
        with torch.no_grad():
            self.weight.mul_(factor)

    def forward(self, x: Tensor, ctx: Ctx | None = None) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:]) if self.norm else x
        return F.linear(straight_through(x, eight_bit(x)), self.rounded_weight().to(x.dtype))

    def rounded_weight(self) -> Tensor:
        """The matrix that multiplies, of at most three values; gradients reach ``weight``."""
        return straight_through(self.weight, ternary(self.weight))


def ternary(w: Tensor) -> Tensor:
    """``w`` rounded to {-g, 0, g}, with ``g`` the mean of its magnitudes."""
    g = w.abs().mean().clamp_min(EPS)
    return (w / g).round().clamp(-1, 1) * g


def eight_bit(x: Tensor) -> Tensor:
    """``x`` rounded to 255 steps between minus and plus its largest magnitude in the last axis."""
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp_min(EPS)
    return (x * scale).round().clamp(-128, 127) / scale


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of ``rounded`` with the gradient of ``x``."""
    return x + (rounded - x).detach()


@LINEARS.register("ternary")
class TernaryConfig(Config):
    """BitNet b1.58: matrices of -1, 0 and 1 times a scale."""

    kind: Literal["ternary"] = "ternary"
    norm: bool = Field(default=True, description="scale what a matrix reads to mean square 1")

    def build(self, d_in: int, d_out: int, name: str = "") -> Ternary:
        return Ternary(d_in, d_out, name, self.norm)
