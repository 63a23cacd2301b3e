"""A table, a matrix to the model's width and a learned scale for the ids of each modality.

B rows, T tokens, S streams, D model, N ids of a modality, R width of its rows.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.errors import UserError, did_you_mean
from mm.model.context import Ctx
from mm.model.embedders.base import IdEmbedder, IdEmbedderConfig, sum_of_rows
from mm.registry import EMBEDDERS
from mm.state import State
from mm.vocabulary import RESERVED, Range, Vocabulary


class OwnTable(nn.Module):
    """``gain * rows P`` of one modality's ids; without a width, rows of the model's and no P."""

    def __init__(self, n_ids: int, width: int | None, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_ids, width or d_model))
        self.projection = nn.Parameter(torch.empty(width, d_model)) if width else None
        self.gain = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.projection is not None:
            nn.init.normal_(self.projection, std=self.projection.shape[1] ** -0.5)
        nn.init.ones_(self.gain)

    def forward(self, ids_BTS: Tensor, scale: float) -> Tensor:
        """`(B, T, D)` of local ids; what is negative is none of its own and adds nothing."""
        x = sum_of_rows(self.weight, ids_BTS, scale)
        if self.projection is not None:
            x = x @ self.projection.to(x.dtype)
        return x * self.gain.to(x.dtype)


class ByModality(IdEmbedder):
    """``scale * sum_s gain_m table_m[ids[..., s]] P_m``, m the modality of the id.

    `tables[0]` is that of ids of no modality, as wide as the model; ``tables[i]`` that of number i
    of `Fields.modality`, its begin and end among them. All run on every token, so that ranks and
    batches that lack a modality call the same modules (ZeRO-3).

    Source: Baevski & Auli 2018, adaptive input (arXiv:1809.10853), section 3: clusters of ids, each
    of a width and a projection of its own; there they are of frequency, without a learned scale.
    """

    looked_up: tuple[str, ...] = ()
    wide_parameters: tuple[str, ...] = ()

    def __init__(self, n_ids: int, d_model: int, config: ByModalityConfig, vocabulary: Vocabulary):
        super().__init__(n_ids, d_model, config)
        for name in config.widths:
            if name not in vocabulary.modalities:
                known = did_you_mean(name, vocabulary.modalities)
                raise UserError(
                    f"model.embedder.widths: the vocabulary has no modality '{name}'{known}"
                )
        self.spans = [vocabulary.range(name) for name in vocabulary.modalities]
        self.used = vocabulary.size  # what comes behind it is of no modality
        counts = [n_ids - self.used + RESERVED, *(r.stop - r.begin for r in self.spans)]
        widths = [None, *(config.widths.get(m, config.width) for m in vocabulary.modalities)]
        pairs = [*enumerate(zip(counts, widths, strict=True))]
        self.tables = nn.ModuleList(OwnTable(n, width, d_model) for _, (n, width) in pairs)
        self.looked_up = tuple(f"tables.{i}.weight" for i, _ in pairs)
        own = lambda width: "weight" if width is None else "projection"
        self.wide_parameters = tuple(f"tables.{i}.{own(width)}" for i, (_, width) in pairs)

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        raise UserError(
            "model.heads: the embedder by_modality has no one table for a head to share; "
            "set heads.*.tied=false, or take model.embedder=factorized"
        )

    def rows_of(self, codes: Range) -> Tensor:
        return self.tables[codes.index].get_parameter("weight")[codes.first - codes.begin :]

    def vectors(
        self, ids_BTS: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        behind = torch.where(ids_BTS >= self.used, ids_BTS - self.used + RESERVED, -1)
        local = [torch.where(ids_BTS < RESERVED, ids_BTS, behind)]
        for r in self.spans:
            local.append(torch.where(ids_BTS < r.stop, ids_BTS - r.begin, -1))
        each = zip(self.tables, local, strict=True)
        return torch.stack([table(ids, self.scale) for table, ids in each]).sum(0), None


@EMBEDDERS.register("by_modality")
class ByModalityConfig(IdEmbedderConfig):
    """Tables of their own for the modalities, each of its own width."""

    kind: Literal["by_modality"] = "by_modality"
    width: Annotated[
        int | None,
        Field(
            gt=0, le=2**20, description="of rows where `widths` says none; default d_model, no P"
        ),
    ] = None
    widths: Annotated[
        dict[str, Annotated[int, Field(gt=0, le=2**20)]],
        Field(description="modality -> width of its rows"),
    ] = {}

    small = {"width": 4}

    def build(self, n_ids: int, d_model: int, vocabulary: Vocabulary = Vocabulary()) -> ByModality:
        return ByModality(n_ids, d_model, self, vocabulary)
