"""Mixers over the cells of grids, and over what lies between grids as lines.

B rows, T tokens, D model, G grids of Y rows and X columns, N = Y X cells, R rows of one document, L
tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.layout import Layout
from mm.model.context import Ctx
from mm.model.layer import Out
from mm.model.mixers.encoder_only.base import BothWays
from mm.model.varlen import PackedRows
from mm.state import State


def grid_indices(layout: Layout) -> list[tuple[int, int, Tensor]]:
    """Rows, columns and flat indices `(G, Y X)` of every kind of grid.

    Of grids with more axes, each slice along the first ones is a grid.
    """
    return [
        (shape[-2], shape[-1], index.long().reshape(-1, shape[-2] * shape[-1]))
        for shape, index in layout.grids.items()
    ]


def in_grids(layout: Layout, device: torch.device) -> Tensor:
    """`(B, T)` bool: a cell of some grid."""
    inside = torch.zeros(layout.shape, dtype=torch.bool, device=device).flatten()
    for _, _, index in grid_indices(layout):
        inside = inside.index_fill(0, index.flatten(), True)
    return inside.view(layout.shape)


class GridMixer(BothWays):
    """Mixes each grid of `Layout.grids` by itself; the rest of each document is one line."""

    def mix_grid(self, cells_GND: Tensor, Y: int, X: int, ctx: Ctx) -> Tensor:
        """`(G, N, D)` cells of grids to as many outputs; ``ctx`` for matrices over them."""
        raise NotImplementedError

    def mix_line(self, x_RLD: Tensor, length_R: Tensor, passed_RL: Tensor, ctx: Ctx) -> Tensor:
        """`BothWays.mix` of documents that have cells of grids where ``passed``."""
        raise NotImplementedError

    def mix(self, x_RLD: Tensor, length_R: Tensor, ctx: Ctx) -> Tensor:
        passed = PackedRows.of(ctx.layout, 0).unpack(in_grids(ctx.layout, x_RLD.device))
        return self.mix_line(x_RLD, length_R, passed, self.of_rows(ctx))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        out = super().forward(x_BTD, ctx, state)
        flat, y = x_BTD.flatten(0, 1), out.y.flatten(0, 1)
        for Y, X, index in grid_indices(ctx.layout):
            there = ctx.at_places(ctx.layout.fields.map(lambda t, i=index: t.flatten(0, 1)[i]))
            mixed = self.mix_grid(flat[index], Y, X, there).flatten(0, 1)
            y = y.index_copy(0, index.flatten(), mixed.to(y.dtype))
        return Out(y.view_as(out.y))
