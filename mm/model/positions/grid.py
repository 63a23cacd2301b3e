"""Learned places inside grids of codes. B rows, T tokens, D model, A axes, P places."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.layout import Fields
from mm.model.positions.base import Position
from mm.registry import POSITIONS


class GridPlace(nn.Module, Position):
    """Add ``sum_a table_a[time - position_a]`` over the axes a of a grid.

    To the vectors of the embedder, or to the input of one attention layer.

    A cell's time minus its row, and minus its column, say together which cell it is, wherever in
    the document the grid stands; outside of grids all axes hold the time and nothing is added.

    Source: learned vectors of patches, Dosovitskiy et al. 2021 (arXiv:2010.11929), section 3.1; a
    sum over axes as in appendix D.4.
    """

    def __init__(self, d_model: int, axes: int, max_cells: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(axes, max_cells, d_model))

    def init_weights(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def embed(self, x_BTD: Tensor, f: Fields) -> Tensor:
        """``x`` with the places of its cells added.

        Raises:
            ValueError: on the CPU, when a grid has more cells than the table (elsewhere the check
                would synchronise; the device itself stops there).
        """
        time = f.position[..., 0].long()
        last = f.position.shape[-1] - 1
        for a, table in enumerate(self.table.unbind(), 1):  # all are used, for the gradients' sake
            offset = (time - f.position[..., min(a, last)]).clamp_min(0)
            if offset.device.type == "cpu" and not torch.compiler.is_compiling() and offset.numel():
                if int(offset.max()) >= len(table):
                    raise ValueError(
                        f"a grid has more than the {len(table)} cells that have learned places;"
                        " raise max_cells"
                    )
            seen = nn.functional.embedding(offset, table).to(x_BTD.dtype)
            x_BTD = x_BTD + seen * (offset > 0)[..., None]
        return x_BTD


@POSITIONS.register("grid")
class GridPlaceConfig(Config):
    """A learned vector for each cell of a grid of codes, such as an image's."""

    kind: Literal["grid"] = "grid"
    axes: Annotated[int, Field(gt=0, description="of the largest grid: rows and columns")] = 2
    max_cells: Annotated[int, Field(gt=0, description="of a grid; more are refused")] = 1024

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> GridPlace:
        return GridPlace(d_model or head_dim * heads, self.axes, self.max_cells)
