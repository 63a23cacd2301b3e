"""Padding inside rows: moved to their ends for the layers, and back. B rows, T tokens, D model."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.layout import Layout
from mm.model.context import Ctx


def move_padding_last(x: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx, Tensor]:
    """Move padding to the end of each row, where a Layout has it.

    Returns `(B, T, D)` and its context, and for each position `(B, T)` where it went in its row.
    """
    order = _order(ctx.layout)
    index = _index(order)
    moved = ctx.derive(index, again=lambda layout: (_index(_order(layout)), None))
    return x.flatten(0, 1)[index].view_as(x), moved, order.argsort(dim=1)


def _order(layout: Layout) -> Tensor:
    return (layout.fields.document == 0).to(torch.int8).argsort(dim=1, stable=True)


def _index(order_BT: Tensor) -> Tensor:
    B, T = order_BT.shape
    return (order_BT + T * torch.arange(B, device=order_BT.device)[:, None]).reshape(-1)


def restore_order(x: Tensor, index_BT: Tensor) -> Tensor:
    """Put `(B, T, D)` back where `move_padding_last` took it from."""
    return x.gather(1, index_BT[..., None].expand(-1, -1, x.shape[-1]))


def moved_places(places_P: Tensor, index_BT: Tensor) -> Tensor:
    """Where `move_padding_last` took flat places ``(P,)``."""
    T = index_BT.shape[1]
    at = places_P.long()
    return (at // T * T + index_BT.flatten()[at]).to(places_P.dtype)
