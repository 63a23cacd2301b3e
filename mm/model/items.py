"""Fields that a mask asks for: given by the data, or made of the ids.

B rows, T tokens, S streams.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mm.errors import UserError, did_you_mean
from mm.layout import Fields, Layout
from mm.mask import Mask
from mm.mask_expression import MARKED
from mm.vocabulary import NULL, Vocabulary


def with_fields(
    layout: Layout, mask: Mask, more: frozenset[str], ids_BTS: Tensor, vocabulary: Vocabulary
) -> Layout:
    """A layout with the named fields that ``mask`` reads, of ``more`` what is there, and no other.

    What is not read would be cached, and regrouped with each layer.

    Raises:
        UserError: the mask reads a field that this batch has not.
    """
    have = layout.fields.extra
    wanted = {*mask.fields} | ({*more} & {*have})
    if wanted == {*have}:
        return layout
    for name in sorted(mask.fields - {*have} - {*MARKED}):
        raise UserError(
            f"the mask {mask.key} reads a field '{name}', which these data have not"
            f"{did_you_mean(name, {*have, *MARKED})}"
        )
    item = "item" in wanted and "item" not in have
    new = sorted(wanted - {*have} - {"item"})
    names = [*(n for n in have if n in wanted), *new]
    # Nobody has a prefix where none is marked.
    given = lambda f, n: f.extra[n] if n in f.extra else torch.zeros_like(f.document)
    layout = layout.map_fields(lambda f: f._replace(extra={n: given(f, n) for n in names}))
    if not item:
        return layout
    f = layout.fields
    made = number_items(f, ids_BTS, vocabulary)
    after = replace(layout, fields=f._replace(extra={**f.extra, "item": made}))
    if not after.is_on_host:  # which does not need it
        after.memo["host"] = layout.on_host
    return after


def number_items(f: Fields, ids_BTS: Tensor, vocabulary: Vocabulary) -> Tensor:
    """`(B, T)` int32: the same number for the tokens of an item, from its begin to its end; or 0.

    It is one more than the time of the item's begin, so that a cache may hold it. 0: its begin is
    not in this call.
    """
    begins = [NULL, *(vocabulary.range(m).begin for m in vocabulary.modalities)]
    first = ids_BTS[..., 0]
    starts = torch.stack([first == i for i in begins]).any(0)
    B, T = f.document.shape
    at = torch.arange(T, device=first.device).expand(B, T)
    begin = torch.where(starts, at, -1).cummax(1).values
    there = begin.clamp_min(0)
    inside = (begin >= 0) & (f.document.gather(1, there) == f.document) & (f.document > 0)
    return torch.where(inside, f.position[..., 0].gather(1, there) + 1, 0).to(torch.int32)
