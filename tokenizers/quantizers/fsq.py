"""Finite scalar quantisation.

Every latent channel is rounded to one of a few levels; there is no codebook to collapse.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.registry import QUANTIZERS
from mm.tokenizers.quantizers.base import (
    Quantized,
    Quantizer,
    full_precision,
    straight_through,
    usage,
)


class FiniteScalarQuantizer(Quantizer):
    """Implicit codebook of ``prod(levels)`` codes on a grid in [-1, 1].

    Channel i has ``levels[i]`` values.

    Source: Mentzer et al. 2023, arXiv:2309.15505, eq. 2-4 and appendix A.1 (bound for even numbers
    of levels).
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...], slack: float = 1e-3):
        """Allocate. ``slack`` keeps the outermost level reachable although tanh never reaches 1."""
        super().__init__()
        self.n_codebooks, self.codebook_size, self.d = 1, math.prod(levels), len(levels)
        self._levels, self.slack = levels, slack
        self.register_buffer(
            "levels", torch.empty(len(levels), dtype=torch.int64), persistent=False
        )
        self.register_buffer("basis", torch.empty(len(levels), dtype=torch.int64), persistent=False)

    def init_weights(self) -> None:
        """Fill the place values of the mixed-radix number that an id is."""
        place = [math.prod(self._levels[:i]) for i in range(len(self._levels))]
        self.levels.copy_(torch.tensor(self._levels))
        self.basis.copy_(torch.tensor(place))

    def bound(self, z: Tensor) -> Tensor:
        """Squash ``(..., d)`` so that rounding gives exactly ``levels`` values a channel."""
        levels = self.levels.to(z.dtype)
        half = (levels - 1) * (1 + self.slack) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def forward(
        self,
        z: Tensor,
        *,
        valid: Tensor | None = None,
        n_books: int | None = None,
        bypass: bool = False,
        seed: Tensor | int = 0,
    ) -> Quantized:
        """See `Quantizer.forward`. aux: usage."""
        with full_precision(z) as full:
            soft = self.bound(full)
            hard = soft.round()
            half = (self.levels // 2).to(soft.dtype)
            ids = ((hard.detach() + half).long() * self.basis).sum(-1, keepdim=True)
            out = (soft if bypass else straight_through(soft, hard)) / half
        return Quantized(out.to(z.dtype), ids, {"usage": usage(ids, self.codebook_size, valid)})

    def decode(self, ids: Tensor) -> Tensor:
        half = self.levels // 2
        digits = ids[..., :1].long() // self.basis % self.levels
        return (digits - half).float() / half.float()


@QUANTIZERS.register("fsq")
class FsqConfig(Config):
    """Finite scalar quantisation."""

    kind: Literal["fsq"] = "fsq"
    levels: Annotated[
        tuple[Annotated[int, Field(ge=2)], ...],
        Field(min_length=1, description="values of each channel; the codebook has their product"),
    ] = (8, 5, 5, 5)

    def build(self) -> FiniteScalarQuantizer:
        """Allocate the quantizer; `mm.model.layer.init_weights` fills it."""
        return FiniteScalarQuantizer(self.levels)

    @classmethod
    def smallest(cls) -> FsqConfig:
        return cls(levels=(4, 3, 2))
