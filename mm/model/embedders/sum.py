"""Sum of the embeddings of all streams of a place, from ONE table.

B rows, T tokens, S streams, D model.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.embedders.base import IdEmbedder, IdEmbedderConfig, sum_of_rows
from mm.registry import EMBEDDERS
from mm.state import State
from mm.vocabulary import Vocabulary


class SumEmbedder(IdEmbedder):
    """``scale * sum_s table[ids[..., s]]``, ``scale`` by default sqrt(D); id -1 adds nothing."""

    def __init__(self, n_ids: int, d_model: int, config: IdEmbedderConfig):
        super().__init__(n_ids, d_model, config)
        self.weight = nn.Parameter(torch.empty(n_ids, d_model))

    def init_weights(self) -> None:
        # Unit variance after the factor sqrt(D), and logits of unit variance where a head shares
        # the table; another factor is for a table that comes with the weights of others.
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def vectors(
        self, ids_BTS: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        return sum_of_rows(self.weight, ids_BTS, self.scale), None


@EMBEDDERS.register("sum")
class SumEmbedderConfig(IdEmbedderConfig):
    """One table for all modalities; the streams of a place are summed."""

    kind: Literal["sum"] = "sum"

    def build(self, n_ids: int, d_model: int, vocabulary: Vocabulary = Vocabulary()) -> SumEmbedder:
        return SumEmbedder(n_ids, d_model, self)
