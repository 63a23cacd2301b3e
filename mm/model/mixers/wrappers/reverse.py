"""Positions that see both ways, and each document's part of them read backwards.

B rows, T tokens, M documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.errors import UserError
from mm.layout import Layout
from mm.mask import Causal, Mask
from mm.model.context import Ctx
from mm.state import State


def both_ways(layout: Layout, mask: Mask) -> Tensor | None:
    """Which leading tokens of each document see each other both ways, `(B, T)` bool.

    None under a mask that has no such tokens.

    All positions of a `Full` mask; under `Prefix` the run of non-zero ``prefix`` positions that a
    document begins with (blocks further on are read forwards only).
    """
    document = layout.fields.document
    if mask.hint == "full":
        return document > 0
    marked = layout.fields.extra.get(mask.atomic or "")
    if marked is None:
        return None
    flat = document.reshape(-1).long()
    others = ((marked == 0) & (document > 0)).reshape(-1).long()
    before = others.cumsum(0) - others  # unmarked positions before this one, over all of the call
    starts = layout.cu_seqlens[:-1].long().clamp_max(max(0, len(flat) - 1))
    if len(flat) and len(starts):
        before = before - before[starts][(flat - 1).clamp_min(0)]
    leading = (before + others == 0) & (flat > 0)
    if len(starts):  # what goes on in this call had its leading run in an earlier one
        leading = leading & layout.fresh[(flat - 1).clamp_min(0)]
    return leading.view_as(document)


def reverse(ctx: Ctx, inside: Tensor) -> tuple[Tensor, Ctx]:
    """Read each document's leading ``inside`` positions backwards, causally.

    Args:
        inside: `(B, T)` bool, the leading positions of each document (`both_ways`).
    Returns:
        `(B * T,)` flat positions that reverse (and reverse back again), and the context of what
        they read: other positions are padding, time runs backwards, no State is read or written.
    """
    index, document = _backwards(ctx.layout, inside)

    def again(layout: Layout) -> tuple[Tensor, Tensor]:
        same = both_ways(layout, ctx.mask)
        assert same is not None
        return _backwards(layout, same)

    return index, ctx.derive(
        index, document=document, again=again, mask=Causal(), time="stays", slots=False
    )


def _backwards(layout: Layout, inside: Tensor) -> tuple[Tensor, Tensor]:
    """`(B * T,)` flat positions that reverse what is ``inside``, and the document numbers there."""
    document = torch.where(inside, layout.fields.document, 0)
    flat = document.reshape(-1).long()
    count = flat.new_zeros(layout.slot.shape[0] + 1).index_add_(0, flat, torch.ones_like(flat))
    here = torch.arange(len(flat), device=flat.device)
    first = torch.cat((flat.new_zeros(1), layout.cu_seqlens[:-1].long()))
    return torch.where(flat > 0, 2 * first[flat] + count[flat] - 1 - here, here), document


def reorder(x_BTD: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` in another order of its flat indices."""
    return x_BTD.flatten(0, 1)[index].view_as(x_BTD)


def refuse_state(kind: str, ctx: Ctx, state: State | None) -> None:
    """Raise UserError on a State under a mask in which the first token reads the last."""
    if state is not None and ctx.mask.hint == "full":
        raise UserError(
            f"{kind}: a full mask needs whole documents; call it without a State, or use a prefix"
        )
