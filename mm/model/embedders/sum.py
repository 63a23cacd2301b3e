"""Sum of the embeddings of all streams of a place, from ONE table.

B rows, T tokens, S streams, D model, N ids.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Embedder
from mm.model.positions.base import Position
from mm.model.positions.randomised import build_added
from mm.registry import EMBEDDERS, PositionField


class SumEmbedder(Embedder):
    """``scale * sum_s table[ids[..., s]]``, ``scale`` by default sqrt(D); id -1 adds nothing."""

    shard = "local"

    def __init__(
        self,
        n_ids: int,
        d_model: int,
        position: Position | None = None,
        scale: float | None = None,
    ):
        super().__init__()
        self.scale = d_model**0.5 if scale is None else scale
        self.position = position or Position()
        self.weight = nn.Parameter(torch.empty(n_ids, d_model))

    def init_weights(self) -> None:
        # Unit variance after the factor sqrt(D), and logits of unit variance where a head shares
        # the table; another factor is for a table that comes with the weights of others.
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, ids_BTS: Tensor, ctx: Ctx) -> Tensor:
        scale = self.scale
        weight = self.weight
        parts = []
        for ids in ids_BTS.unbind(-1):
            x = nn.functional.embedding(ids.clamp_min(0), weight)
            parts.append(x * ((ids >= 0).to(x.dtype) * scale)[..., None])
        x = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        f = ctx.layout.fields
        if self.training:
            f = f._replace(position=self.position.ids(f, ctx))
        return self.position.embed(x, f)


@EMBEDDERS.register("sum")
class SumEmbedderConfig(Config):
    """One table for all modalities; the streams of a place are summed."""

    kind: Literal["sum"] = "sum"
    position: Annotated[
        PositionField,
        Field(description="absolute positions, added here: learned, sinusoidal"),
    ] = Field(default="none", validate_default=True)
    scale: float | None = Field(default=None, gt=0, description="of rows; default sqrt(d_model)")

    def build(self, n_ids: int, d_model: int) -> SumEmbedder:
        return SumEmbedder(n_ids, d_model, build_added(self.position, d_model), self.scale)
