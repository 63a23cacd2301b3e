"""The class of a document: a softmax over ids of its pooled hidden states. P places, D model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.model.context import Ctx
from mm.model.heads.embedding import Pool, pool
from mm.model.heads.softmax import Softmax, SoftmaxConfig
from mm.model.layer import HeadOut
from mm.registry import HEADS
from mm.state import State
from mm.vocabulary import PAD


class Classes(Softmax):
    """The softmax head over what `pool` makes of the document of each place.

    With a label of `to_label` its place is the document's first one, and its id the label's first.
    """

    predicts_ids = False

    def __init__(self, d_model: int, n_ids: int, config: ClassesConfig):
        super().__init__(d_model, n_ids, config)
        self.pool: Pool = config.pool

    def forward(
        self,
        h_BTD: Tensor,
        ctx: Ctx,
        places_P: Tensor,
        target: Any = None,
        state: State | None = None,
    ) -> HeadOut:
        pooled = pool(h_BTD, ctx, places_P, self.pool)
        every = torch.arange(len(pooled), device=pooled.device)
        ids = target
        if target is not None and target.dim() == 2:
            ids = target[:, 0] if target.shape[1] else target.new_zeros(len(target))
        return super().forward(pooled[None], ctx, every, ids)


@HEADS.register("classes")
class ClassesConfig(SoftmaxConfig):
    """A class of each document; its name in `model.heads` is the modality of the label."""

    kind: Literal["classes"] = "classes"  # type: ignore[assignment]
    pool: Annotated[
        Pool, Field(description="last: the state at the place; mean: of the whole document")
    ] = "mean"

    def example(self, n: int) -> Tensor:
        """Targets of ``n`` places, for plans."""
        return torch.full((n, 1), PAD + 1)

    def build(self, d_model: int, n_ids: int) -> Classes:
        return Classes(d_model, n_ids, self)

    small = {"pool": "last"}
