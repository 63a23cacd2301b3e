"""A table narrower than the model, and one matrix that widens what is read from it.

B rows, T tokens, S streams, D model, N ids, R rank.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.embedders.base import IdEmbedder, IdEmbedderConfig, sum_of_rows
from mm.registry import EMBEDDERS
from mm.state import State
from mm.vocabulary import Vocabulary


class Factorized(IdEmbedder):
    """``scale * (sum_s table[ids[..., s]]) P``: N R + R D weights in place of N D.

    A tied head's logits are ``(h P^T) table^T``.

    Source: Lan et al. 2019, ALBERT (arXiv:1909.11942), section 3.1, factorized embedding.
    """

    wide_parameters = ("projection",)

    def __init__(self, n_ids: int, d_model: int, config: FactorizedConfig):
        super().__init__(n_ids, d_model, config)
        self.weight = nn.Parameter(torch.empty(n_ids, config.rank))
        self.projection = nn.Parameter(torch.empty(config.rank, d_model))

    def init_weights(self) -> None:
        # Their product has the variance of the table of `sum`.
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.normal_(self.projection, std=self.projection.shape[1] ** -0.5)

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.projection

    def vectors(
        self, ids_BTS: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        rows = sum_of_rows(self.weight, ids_BTS, self.scale)
        return rows @ self.projection.to(rows.dtype), None


@EMBEDDERS.register("factorized")
class FactorizedConfig(IdEmbedderConfig):
    """One table of ``rank`` for all modalities, and a matrix from it to the model's width."""

    kind: Literal["factorized"] = "factorized"
    rank: Annotated[int, Field(gt=0, le=2**20, description="width of a row of the table")] = 128

    small = {"rank": 4}

    def build(self, n_ids: int, d_model: int, vocabulary: Vocabulary = Vocabulary()) -> Factorized:
        return Factorized(n_ids, d_model, self)
