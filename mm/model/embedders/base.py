"""What embedders of ids share: the streams' sum, positions, noise.

B rows, T tokens, S streams, D model, N ids, R width of a row.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Embedder, Out
from mm.model.noise import generator
from mm.model.positions.randomised import build_added
from mm.registry import PositionField
from mm.state import State


class IdEmbedder(Embedder):
    """``scale`` times what the ids of a place say, by default sqrt(D); and its position.

    With ``noise`` a, each value of a document of L tokens takes ``a / sqrt(L D)`` times a uniform
    draw from -1 to 1 while it trains.

    Source of the noise: Jain et al. 2023, NEFTune (arXiv:2310.05914), algorithm 1.
    """

    shard = "local"

    def __init__(self, n_ids: int, d_model: int, config: IdEmbedderConfig):
        super().__init__()
        self.n_ids, self.noise = n_ids, config.noise
        self.scale = d_model**0.5 if config.scale is None else config.scale
        self.position = build_added(config.position, d_model)

    def vectors(
        self, ids_BTS: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        """`(B, T, D)` of the ids of a place, scaled, and the State after the call."""
        raise NotImplementedError

    def forward(self, ids_BTS: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        x, after = self.vectors(ids_BTS, ctx, state)
        f = ctx.layout.fields
        if self.training and self.noise:
            x = x + self._noise(x, ctx)
        if self.training:
            f = f._replace(position=self.position.ids(f, ctx))
        return Out(self.position.embed(x, f), after)

    def _noise(self, x: Tensor, ctx: Ctx) -> Tensor:
        document, starts = ctx.layout.fields.document.long(), ctx.layout.cu_seqlens
        length = torch.zeros(len(starts), device=x.device)  # of padding 0
        length.index_add_(0, document.flatten(), length.new_ones(document.numel()))
        name = "noise" if ctx.shard is None else f"noise.{ctx.shard.rank}"
        drawn = torch.rand(x.shape, generator=generator(ctx, None, name, x.device), device=x.device)
        scale = self.noise * (length[document] * x.shape[-1]).rsqrt() * (document > 0)
        return (scale[..., None] * (2 * drawn - 1)).to(x.dtype)


def sum_of_rows(weight_NR: Tensor, ids_BTS: Tensor, scale: float) -> Tensor:
    """``scale * sum_s weight[ids[..., s]]`` `(B, T, R)`; a negative id adds nothing."""
    parts = []
    for ids in ids_BTS.unbind(-1):
        x = nn.functional.embedding(ids.clamp_min(0), weight_NR)
        parts.append(x * ((ids >= 0).to(x.dtype) * scale)[..., None])
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class IdEmbedderConfig(Config):
    """What every embedder of ids can be told."""

    position: Annotated[
        PositionField,
        Field(description="absolute positions, added here: learned, sinusoidal"),
    ] = Field(default="none", validate_default=True)
    scale: float | None = Field(default=None, gt=0, description="of rows; default sqrt(d_model)")
    noise: float = Field(
        default=0.0, ge=0, description="of embeddings in training, such as 5 (NEFTune)"
    )
