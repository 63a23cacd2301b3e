"""Learned biases of bucketed distances. R rows, T queries, S keys, H heads, N buckets."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.attention.spec import ScoreSpec
from mm.layout import Fields
from mm.model.positions.base import Position
from mm.registry import POSITIONS


def bucket(distance: Tensor, buckets: int, max_distance: int, both_ways: bool) -> Tensor:
    """Bucket of ``query - key`` places (int): exact up to half the buckets, then logarithmic.

    All distances from ``max_distance`` on share the last one.

    ``both_ways``: keys after the query have the upper half of the buckets; otherwise bucket 0.
    """
    offset = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        offset = (distance < 0).to(distance.dtype) * buckets
        distance = distance.abs()
    else:
        distance = distance.clamp_min(0)
    exact = buckets // 2
    ratio = (distance.clamp_min(exact).to(torch.float64) / exact).log() / math.log(
        max_distance / exact
    )
    # The tiny nudge: at exact powers a rounded logarithm may fall short of its bucket.
    far = exact + (ratio * (buckets - exact) + 1e-9).to(distance.dtype)
    return offset + torch.where(distance < exact, distance, far.clamp_max(buckets - 1))


class T5Bias(nn.Module, Position):
    """Add ``table[bucket(distance), h]`` to the logits; each layer has its own table.

    Source: Raffel et al. 2019 (arXiv:1910.10683), section 2.1 (there one table for all layers).
    """

    def __init__(self, heads: int, buckets: int, max_distance: int, both_ways: bool):
        super().__init__()
        self.buckets, self.max_distance, self.both_ways = buckets, max_distance, both_ways
        self.table = nn.Parameter(torch.empty(buckets, heads))

    def init_weights(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def score(self, q: Tensor, fq: Fields, fk: Fields) -> Tensor:
        """`(R, H, T, S)` in the dtype of the table."""
        distance = fq.position[:, :, None, 0] - fk.position[:, None, :, 0]
        index = bucket(distance.long(), self.buckets, self.max_distance, self.both_ways)
        return nn.functional.embedding(index, self.table).movedim(-1, 1)

    def scores(self, q: Tensor, fq: Fields, fk: Fields) -> ScoreSpec:
        """`score` as a table of distances: those past the last are one."""
        reach = torch.arange(-self.max_distance, self.max_distance + 1, device=self.table.device)
        index = bucket(reach, self.buckets, self.max_distance, self.both_ways)
        return ScoreSpec(
            relative_NH=nn.functional.embedding(index, self.table),
            position_RT=fq.position[..., 0],
            position_RS=fk.position[..., 0],
        )


@POSITIONS.register("t5_bias")
class T5BiasConfig(Config):
    """Bucketed learned biases."""

    kind: Literal["t5_bias"] = "t5_bias"
    buckets: Annotated[int, Field(ge=4)] = 32
    max_distance: int = Field(default=128, gt=1, description="all distances from here on are one")
    both_ways: bool = Field(default=False, description="half the buckets for keys after the query")

    position: ClassVar[type[T5Bias]] = T5Bias

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> T5Bias:
        if self.max_distance <= self.buckets // (4 if self.both_ways else 2):
            raise ValueError(
                f"{self.kind}: max_distance {self.max_distance} must exceed the exact buckets"
            )
        return self.position(heads, self.buckets, self.max_distance, self.both_ways)
