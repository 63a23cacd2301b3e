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
from mm.model.noise import generator
from mm.model.positions.base import Position
from mm.model.positions.randomised import build_added
from mm.registry import EMBEDDERS, PositionField


class SumEmbedder(Embedder):
    """``scale * sum_s table[ids[..., s]]``, ``scale`` by default sqrt(D); id -1 adds nothing.

    With ``noise`` a, each value of a document of L tokens takes ``a / sqrt(L D)`` times a uniform
    draw from -1 to 1 while it trains.

    Source of the noise: Jain et al. 2023, NEFTune (arXiv:2310.05914), algorithm 1.
    """

    shard = "local"

    def __init__(
        self,
        n_ids: int,
        d_model: int,
        position: Position | None = None,
        scale: float | None = None,
        noise: float = 0.0,
    ):
        super().__init__()
        self.noise = noise
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
        if self.training and self.noise:
            x = x + self._noise(x, ctx)
        if self.training:
            f = f._replace(position=self.position.ids(f, ctx))
        return self.position.embed(x, f)

    def _noise(self, x: Tensor, ctx: Ctx) -> Tensor:
        document, starts = ctx.layout.fields.document.long(), ctx.layout.cu_seqlens
        length = torch.zeros(len(starts), device=x.device)  # of padding 0
        length.index_add_(0, document.flatten(), length.new_ones(document.numel()))
        name = "noise" if ctx.shard is None else f"noise.{ctx.shard.rank}"
        drawn = torch.rand(x.shape, generator=generator(ctx, None, name, x.device), device=x.device)
        scale = self.noise * (length[document] * x.shape[-1]).rsqrt() * (document > 0)
        return (scale[..., None] * (2 * drawn - 1)).to(x.dtype)


@EMBEDDERS.register("sum")
class SumEmbedderConfig(Config):
    """One table for all modalities; the streams of a place are summed."""

    kind: Literal["sum"] = "sum"
    position: Annotated[
        PositionField,
        Field(description="absolute positions, added here: learned, sinusoidal"),
    ] = Field(default="none", validate_default=True)
    scale: float | None = Field(default=None, gt=0, description="of rows; default sqrt(d_model)")
    noise: float = Field(
        default=0.0, ge=0, description="of embeddings in training, such as 5 (NEFTune)"
    )

    def build(self, n_ids: int, d_model: int) -> SumEmbedder:
        return SumEmbedder(
            n_ids, d_model, build_added(self.position, d_model), self.scale, self.noise
        )
