"""Embeddings of values in the places that their documents keep for them.

B rows, T tokens, D model, G items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mm.batch import Batch, Sum, Values, add_sums
from mm.errors import UserError
from mm.mask import Full
from mm.model.context import Ctx, Memory
from mm.model.layer import Adapter, Embedder
from mm.vocabulary import Vocabulary


def fill(
    x: Tensor,
    batch: Batch,
    ctx: Ctx,
    adapters: nn.ModuleDict,
    embedder: Embedder,
    aux: dict[str, Sum],
) -> tuple[Tensor, Ctx]:
    """Put the adapters' embeddings into their places; unfilled places become padding.

    Returns ``ctx`` itself where the host knows that none is unfilled. Where processes share the
    rows, each embeds all values, whose places are those of whole rows, and takes what is its own.
    """
    alone = replace(ctx, shard=None)
    B, T, D = x.shape
    end = B * T  # what does not fit an item's room is written here, and dropped
    flat = torch.cat((x.reshape(end, D), x.new_zeros(1, D)))
    empty = torch.zeros(end + 1, dtype=torch.bool, device=x.device)
    is_full = True
    for name, adapter in adapters.items():
        assert isinstance(adapter, Adapter)
        values = batch.values.get(name)
        if values is None:
            # Same modules on every rank: one zero item with no room, so that ZeRO-3 gathers
            # here too.
            one = torch.zeros(1, dtype=torch.int32, device=x.device)
            values = Values(adapter.zero_item(x.device), one + 1, one, one, is_full=True)
        filled = adapter(values, alone)
        # Layers inside an adapter report by their whole name; second sequences report, too.
        whole = f"adapters.{name}."
        add_sums(aux, {whole + k.removeprefix(whole): v for k, v in filled.aux.items()})
        embedded = filled.x if filled.x is not None else embedder(filled.ids, ctx).y
        at = torch.arange(embedded.shape[1], device=x.device)
        first = values.place.long()
        used = at < torch.minimum(filled.length, values.room)[:, None]
        target = torch.where(used, first[:, None] + at, end)
        if ctx.shard is not None:
            target = torch.where(used, ctx.shard.own(first[:, None] + at, end), end)
        flat = flat.index_put((target.reshape(-1),), embedded.to(flat.dtype).flatten(0, 1))
        if values.is_full and adapter.keeps_length:
            continue
        is_full = False
        # Rooms are intervals: a running sum of their ends says which positions they cover.
        edge = torch.zeros(end + 1, dtype=torch.int32, device=x.device)
        one = torch.ones_like(first, dtype=torch.int32)
        edge.index_add_(0, first, one).index_add_(0, first + values.room, -one)
        room = edge.cumsum(0) > 0
        empty |= room.index_put((target.reshape(-1),), room.new_zeros(()))
    if is_full:
        return flat[:-1].view(B, T, D), ctx
    document = ctx.layout.fields.document
    document = document.masked_fill(empty[:-1].view(B, T), 0)
    return flat[:-1].view(B, T, D), ctx.derive(document=document)


def embed_part(
    part: Batch, ctx: Ctx, adapters: nn.ModuleDict, embedder: Embedder, aux: dict[str, Sum]
) -> Memory:
    """A second sequence, embedded as the main one is."""
    own = replace(ctx, layout=part.layout, ids=part.ids)
    x, _, _, reported = embedder(part.ids, own)
    add_sums(aux, reported)
    if len(adapters):
        x, own = fill(x, part, own, adapters, embedder, aux)
    return Memory(own.layout, Full(), x)


def require_adapters(
    adapters: Mapping[str, Any], heads: Mapping[str, Any], vocabulary: Vocabulary
) -> None:
    """Raise UserError where values of the vocabulary have no adapter, or head, that fits them."""
    for name, n in ((s.modality, s.n_features) for s in vocabulary.ranges if s.continuous):
        if name not in adapters:
            raise UserError(
                f"model.adapters has none for '{name}', which is read as values: set "
                f"model.adapters={{{name}: {{kind: linear, d_in: {n}}}}}"
            )
        if (have := adapters[name].d_in) != n:
            raise UserError(
                f"model.adapters.{name} reads {have} features a place, the data have {n}: set "
                "it to what its tokenizer gives"
            )
        head = heads.get(name)
        if head is not None and (out := getattr(head, "d_out", None)) != n:
            raise UserError(
                f"model.heads.{name} predicts {out or 'no'} values a place, the data have {n}: "
                f"set model.heads.{name}={{kind: mixture, d_out: {n}}}"
            )
