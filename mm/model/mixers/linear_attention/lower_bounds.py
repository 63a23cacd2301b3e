"""Lower bounds of decays that grow with depth, from one table for all layers. K layers, W width."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import Layer, Provider


class LowerBounds(Provider):
    """``g_k``: the sum of rows before k of a softmax over layers, channel by channel.

    The first layer's bound is 0, so that it may forget all; later layers forget ever less.

    Source: Qin et al. 2023, HGRN (arXiv:2311.04823), section 3.2.
    """

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(layers, width))

    def init_weights(self) -> None:
        nn.init.zeros_(self.table)

    def forward(self, ctx: Ctx) -> Tensor:
        """`(K, W)` bounds in [0, 1), float32 or wider."""
        wide = torch.promote_types(self.table.dtype, torch.float32)
        share = self.table.to(wide).softmax(0)
        return F.pad(share[:-1].cumsum(0), (0, 0, 1, 0))


def shared_bounds(width: int) -> tuple[str, Callable[[int], Provider]]:
    """What `Layer.provider` answers for a layer whose bounds come from the table of its width."""
    return f"lower_bounds_{width}", lambda layers: LowerBounds(layers, width)


def shared_bound(layer: Layer, ctx: Ctx) -> Tensor | None:
    """``layer``'s row `(W,)` of its table; None for the first layer, whose bound is 0."""
    wanted = layer.provider()
    table = ctx.provided.get(wanted[0]) if wanted is not None and layer.provider_row else None
    return table[layer.provider_row] if table is not None else None
