"""Places that see both ways, and each document's part of them read backwards. B rows, T tokens, M
documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mm.errors import UserError
from mm.layout import Layout
from mm.model.layer import Ctx
from mm.state import State


def both_ways(ctx: Ctx) -> Tensor | None:
    """`(B, T)` bool: the leading places of each document that the mask lets see each other both
    ways; None under a mask that has no such places.

    All places of a `Full` mask; under `Prefix` the run of non-zero ``prefix`` places that a
    document begins with (blocks further on are read forwards only).
    """
    document = ctx.layout.fields.document
    if ctx.mask.hint == "full":
        return document > 0
    marked = ctx.layout.fields.extra.get(ctx.mask.atomic or "")
    if marked is None:
        return None
    flat = document.reshape(-1).long()
    others = ((marked == 0) & (document > 0)).reshape(-1).long()
    before = others.cumsum(0) - others  # unmarked places before this one, over all of the call
    starts = ctx.layout.cu_seqlens[:-1].long().clamp_max(max(0, len(flat) - 1))
    if len(flat) and len(starts):
        before = before - before[starts][(flat - 1).clamp_min(0)]
    leading = (before + others == 0) & (flat > 0)
    return leading.view_as(document)


def mirrored(layout: Layout, inside: Tensor) -> tuple[Tensor, Layout]:
    """Flat places `(B * T,)` that read each document's leading ``inside`` places backwards (and
    back again), and the layout of what they read: other places are padding.
    """
    document = torch.where(inside, layout.fields.document, 0)
    flat = document.reshape(-1).long()
    count = flat.new_zeros(layout.slot.shape[0] + 1).index_add_(0, flat, torch.ones_like(flat))
    here = torch.arange(len(flat), device=flat.device)
    first = torch.cat((flat.new_zeros(1), layout.cu_seqlens[:-1].long()))
    index = torch.where(flat > 0, 2 * first[flat] + count[flat] - 1 - here, here)
    none = torch.full_like(layout.slot, -1)
    return index, replace(layout, fields=layout.fields._replace(document=document), slot=none)


def gathered(x_BTD: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` in another order of its flat places."""
    return x_BTD.flatten(0, 1)[index].view_as(x_BTD)


def elsewhere(ctx: Ctx, layout: Layout) -> Ctx:
    """``ctx`` for another layout: what was prepared for the old one is left behind, tensors that
    Providers made stay.
    """
    kept = {k: v for k, v in ctx.shared.items() if isinstance(v, Tensor)}
    return replace(ctx, layout=layout, shared=kept, draft=False)


def unused(parameters: Iterable[nn.Parameter], like: Tensor) -> Tensor:
    """A zero that hangs on parameters which a pass does not need: their gradients are zeros, not
    missing.
    """
    return sum((p.reshape(-1)[:0].sum() for p in parameters), like.new_zeros(())).to(like.dtype)


def refuse_state(kind: str, ctx: Ctx, state: State | None) -> None:
    """Raise UserError on a State under a mask in which the first token reads the last."""
    if state is not None and ctx.mask.hint == "full":
        raise UserError(
            f"{kind}: a full mask needs whole documents; call it without a State, or use a prefix"
        )
