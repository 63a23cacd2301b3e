"""Padding inside rows: moved to their ends for the layers, and back. B rows, T tokens, D model."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.model.context import Ctx


def move_padding_last(x: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx, Tensor]:
    """Move padding to the end of each row, where a Layout has it.

    Returns `(B, T, D)` and its context, and for each position `(B, T)` where it went in its row.
    """
    B, T, _ = x.shape
    order = (ctx.layout.fields.document == 0).to(torch.int8).argsort(dim=1, stable=True)
    index = (order + T * torch.arange(B, device=x.device)[:, None]).reshape(-1)
    return x.flatten(0, 1)[index].view_as(x), ctx.derive(index), order.argsort(dim=1)


def restore_order(x: Tensor, index_BT: Tensor) -> Tensor:
    """Put `(B, T, D)` back where `move_padding_last` took it from."""
    return x.gather(1, index_BT[..., None].expand(-1, -1, x.shape[-1]))
