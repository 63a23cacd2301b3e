"""Memories by name: which layers attend to them, and their documents beside those of the readers.

R rows of one document, S positions of a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from mm.errors import UserError
from mm.kernels.attention.spec import MaskSpec
from mm.layout import Fields, Layout
from mm.model.context import Ctx, Memory
from mm.model.layer import Layer
from mm.model.length_buckets import Group, LengthBuckets, document_groups

MEMORIES = "memories."  # before the name of a memory in `Caps.reads` and `Caps.publishes`


def memories_read(module: nn.Module) -> set[str]:
    """Names of the memories that Layers in a module attend to and none in it makes."""
    caps = [m.caps for m in module.modules() if isinstance(m, Layer)]
    names = lambda kind: {n for c in caps for n in getattr(c, kind) if n.startswith(MEMORIES)}
    return {n.removeprefix(MEMORIES) for n in names("reads") - names("publishes")}


def check_memories(backbone: nn.Module, parts: Sequence[str]) -> None:
    """Raise UserError where a layer attends to what neither the backbone nor the batch brings."""
    for name in sorted(memories_read(backbone) - {*parts}):
        raise UserError(
            f"model.backbone: a layer attends to the memory '{name}', which nothing makes: take a "
            "backbone encoder_decoder, or name a second sequence of the data in model.parts"
        )


def refuse_memories(backbone: nn.Module, where: str) -> None:
    """Raise UserError where a backbone that sees an item alone attends to a memory."""
    for name in sorted(memories_read(backbone)):
        raise UserError(
            f"{where}: a layer attends to the memory '{name}', but items are read alone: take "
            "attention"
        )


def fields_read(module: nn.Module) -> frozenset[str]:
    """What Layers in a module say that they read, named fields among it."""
    caps = (m.caps for m in module.modules() if isinstance(m, Layer))
    return frozenset().union(*(c.reads for c in caps))


def memory_groups(ctx: Ctx, memory: Memory) -> LengthBuckets | None:
    """The memory's documents in the rows in which `document_groups` has their readers.

    Made once for all layers of a pass; None inside a graph unless it was made before.
    """
    made = memory.layout.memo.get("readers")
    if made is not None and made[0] is ctx.layout and made[1] == memory.mask.key:
        return made[2]
    readers = document_groups(ctx)
    if readers is None or torch.compiler.is_compiling():
        return None
    with torch.no_grad():
        host = document_groups(replace(ctx, layout=ctx.layout.on_host()))
        assert host is not None
        index = None if host.index is None else host.index.numpy()
        groups = _group(ctx.layout, memory, readers, index)
    memory.layout.memo["readers"] = (ctx.layout, memory.mask.key, groups)
    return groups


def _group(
    reader: Layout, memory: Memory, readers: LengthBuckets, index_of: np.ndarray | None
) -> LengthBuckets:
    """`memory_groups`; ``index_of``: that of ``readers``, on the host."""
    known, device = memory.layout.arrays(), reader.fields.document.device
    numbers = reader.arrays().document
    size = memory.layout.shape[0] * memory.layout.shape[1]
    begins = 0
    groups, indices, unread, at = [], [], [], 0
    inverse = np.full(size, -1)
    f = reader.fields
    parts = [f.position, f.document, f.modality, *f.extra.values()]
    for group, (position, document, modality, *extra) in readers.split(*parts):
        fq = Fields(position, document, modality, dict(zip(f.extra, extra, strict=True)))
        first = (
            np.arange(group.rows) * group.length
            if index_of is None
            else index_of[begins : begins + group.rows * group.length : group.length]
        )
        begins += group.rows * group.length
        number = numbers[first] if len(numbers) else np.zeros(group.rows, np.int64)
        count = np.where(number > 0, known.length[number - 1], 0)
        start = np.where(number > 0, known.start[number - 1], 0)
        S = max(1, int(count.max(initial=0)))
        last = np.maximum(count - 1, 0)[:, None]
        # Padding repeats the document's own last position, which a mask hides.
        index = np.minimum(start[:, None] + np.minimum(np.arange(S), last), max(size - 1, 0))
        valid = np.arange(S) < count[:, None]
        inverse[index[valid]] = at + np.flatnonzero(valid.reshape(-1))
        there = torch.from_numpy(index).to(device)
        fk = memory.layout.fields.map(lambda t, i=there: t.flatten(0, 1)[i])
        fk = fk._replace(document=fk.document * torch.from_numpy(valid).to(device))
        spec = MaskSpec()
        if memory.mask.hint != "full":
            spec = MaskSpec(memory.mask.dense(fq, fk))
        elif not valid.all():
            spec = MaskSpec(document_RT=fq.document, document_RS=fk.document)
        groups.append(Group(len(index), S, spec))
        indices.append(index.reshape(-1))
        unread.append(~valid.reshape(-1))
        at += index.size
    inverse[inverse < 0] = at
    made = [np.concatenate([*indices, [0]]), inverse, np.concatenate([*unread, [True]])]
    index, back, copies = (torch.from_numpy(a).to(device) for a in made)
    return LengthBuckets(tuple(groups), index, back, copies)
