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


def key_of(modality: str) -> str:
    """The name of a modality's table: that of no method of the dictionary, as `values` would be."""
    return f"{modality}_ids"


class ByModality(IdEmbedder):
    """``scale * sum_s gain_m table_m[ids[..., s]] P_m``, m the modality of the id.

    `control` is the table of ids of no modality, as wide as the model; one of `tables` has the ids
    of a modality, its begin and end among them. All run on every token, so that ranks and batches
    that lack a modality call the same modules (ZeRO-3).

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
        self.spans = {key_of(name): vocabulary.range(name) for name in vocabulary.modalities}
        self.used = vocabulary.size  # what comes behind it is of no modality
        self.control = OwnTable(n_ids - self.used + RESERVED, None, d_model)
        self.tables = nn.ModuleDict()
        for name, (key, span) in zip(vocabulary.modalities, self.spans.items(), strict=True):
            width = config.widths.get(name, config.width)
            self.tables[key] = OwnTable(span.stop - span.begin, width, d_model)
        own = {"control": self.control} | {f"tables.{k}": t for k, t in self.tables.items()}
        self.looked_up = tuple(f"{name}.weight" for name in own)
        self.wide_parameters = tuple(
            f"{name}.{'weight' if table.projection is None else 'projection'}"
            for name, table in own.items()
        )

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        raise UserError(
            "model.heads: the embedder by_modality has no one table for a head to share; "
            "set heads.*.tied=false, or take model.embedder=factorized"
        )

    def rows_of(self, codes: Range) -> Tensor:
        (key,) = (key for key, span in self.spans.items() if span == codes)
        return self.tables[key].get_parameter("weight")[codes.first - codes.begin :]

    def vectors(
        self, ids_BTS: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        behind = torch.where(ids_BTS >= self.used, ids_BTS - self.used + RESERVED, -1)
        x = self.control(torch.where(ids_BTS < RESERVED, ids_BTS, behind), self.scale)
        for key, span in self.spans.items():
            local = torch.where(ids_BTS < span.stop, ids_BTS - span.begin, -1)
            x = x + self.tables[key](local, self.scale)
        return x, None


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
