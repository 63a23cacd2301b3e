"""A learned gain for each distance, after the softmax. R rows, T queries, S keys, H heads."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.attention.spec import ScoreSpec
from mm.layout import Fields
from mm.model.positions.t5_bias import T5Bias, T5BiasConfig
from mm.registry import POSITIONS


class URPE(T5Bias):
    """``A = (softmax(Q K^T + B) * C) V``: relative biases, and a Toeplitz gain ``c_{i-j}`` a head.

    Rows of A need not sum to one, so that even equal tokens can tell their places apart; no biases
    alone can. Distances from ``max_distance`` on share one gain.

    Source: Luo et al. 2022 (arXiv:2205.13401), with the bucketed biases of Raffel et al.
    2019 (arXiv:1910.10683) for B.
    """

    def __init__(self, heads: int, buckets: int, max_distance: int, both_ways: bool):
        super().__init__(heads, buckets, max_distance, both_ways)
        self.toeplitz = nn.Parameter(torch.empty(max_distance * (2 if both_ways else 1), heads))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.ones_(self.toeplitz)

    def gain(self, fq: Fields, fk: Fields) -> Tensor:
        """`(R, H, T, S)` in the dtype of the table."""
        distance = (fq.position[:, :, None, 0] - fk.position[:, None, :, 0]).long()
        index = distance.abs().clamp_max(self.max_distance - 1)
        if self.both_ways:
            index = torch.where(distance < 0, index + self.max_distance, index)
        return nn.functional.embedding(index, self.toeplitz).movedim(-1, 1)

    def scores(self, q: Tensor, fq: Fields, fk: Fields) -> ScoreSpec:
        return super().scores(q, fq, fk)._replace(gain_RHTS=self.gain(fq, fk))


@POSITIONS.register("urpe")
class URPEConfig(T5BiasConfig):
    """Universal relative positions: biases before the softmax, gains after it."""

    kind: Literal["urpe"] = "urpe"  # type: ignore[assignment]
    both_ways: Annotated[bool, Field(description="keys after the query have their own")] = False

    position = URPE
