"""One vector a document, to compare documents by. P places, D model, E width, M documents."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Head, HeadOut
from mm.registry import HEADS
from mm.state import State

Pool = Literal["last", "mean"]


def pool(h_BTD: Tensor, ctx: Ctx, places_P: Tensor, how: Pool) -> Tensor:
    """`(P, D)`: the hidden state at each place, or the mean over the document that it is of."""
    flat, places = h_BTD.flatten(0, 1), places_P.long()
    if how == "last":
        return flat.index_select(0, places)
    document = ctx.layout.fields.document.flatten().long()
    M = ctx.layout.slot.shape[0]
    total = flat.new_zeros(M + 1, flat.shape[1]).index_add_(0, document, flat)
    count = flat.new_zeros(M + 1).index_add_(0, document, torch.ones_like(flat[:, 0]))
    return (total / count.clamp_min(1)[:, None])[document[places]]


class Vectors(NamedTuple):
    """What the head says: `(P, E)` vectors whose products are the logits of pairs.

    Their length is the root of the scale, so that it is learned with them.
    """

    mean: Tensor  # (P, E)

    @property
    def logits(self) -> None:
        """There are none of a vector alone."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Logits of pairs with other vectors `(P, E)`, which are no probabilities of one."""
        return (self.mean * value).sum(-1)

    def sample(self, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """The vectors: nothing is drawn."""
        return self.mean


class Embedding(Head):
    """``normalize(h @ weight.T) * sqrt(scale)`` of a pooled hidden state, the scale learned.

    Sources: projection, norm and learned scale: Radford et al. 2021 (CLIP, arXiv:2103.00020),
    section 2.3; the last state of a decoder: Wang et al. 2023 (arXiv:2401.00368), section 3.2.
    """

    predicts_ids = False
    scale_free = True

    def __init__(self, d_model: int, config: EmbeddingConfig):
        super().__init__()
        self.reads, self.start = config.reads, config.scale
        self.pool: Pool = config.pool
        self.most = math.log(config.max_scale)
        self.weight = nn.Parameter(torch.empty(config.d_out, d_model))
        self.log_scale = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.constant_(self.log_scale, math.log(self.start))

    def forward(
        self,
        h_BTD: Tensor,
        ctx: Ctx,
        places_P: Tensor,
        target: Any = None,
        state: State | None = None,
    ) -> HeadOut:
        """Vectors at ``places``, each the last one of its document; there is no ``target``."""
        h = pool(h_BTD, ctx, places_P, self.pool)
        x = nn.functional.linear(h, self.weight.to(h.dtype))
        x = nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        made = x * (self.log_scale.to(x.dtype).clamp_max(self.most) / 2).exp()
        if target is not None:  # objectives that compare take the vectors
            return HeadOut(made.sum(-1) * 0.0, None)
        return HeadOut(None, Vectors(made))


@HEADS.register("embedding")
class EmbeddingConfig(Config):
    """A vector of ``d_out`` numbers a document. The objective `contrastive` trains it."""

    kind: Literal["embedding"] = "embedding"
    d_out: Annotated[int, Field(gt=0, le=2**16, description="width of the vectors")] = 64
    pool: Annotated[
        Pool, Field(description="last: the state at the end; mean: of the whole document")
    ] = "last"
    scale: Annotated[float, Field(gt=0, description="of products, at the start")] = 14.3
    max_scale: Annotated[float, Field(gt=0, description="of products, at most")] = 100.0
    reads: Annotated[str, Field(description="hidden states that it reads")] = "hidden"

    def build(self, d_model: int, n_ids: int) -> Embedding:
        return Embedding(d_model, self)

    small = {"d_out": 4}
