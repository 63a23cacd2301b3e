"""Draft calls of layers whose State cannot be cut: accepting a prefix replays it.

B rows, T tokens, D model, N slots, L longest row of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mm.layout import Fields, Layout
from mm.model.context import Ctx, Memory
from mm.model.varlen import PackedRows, memory_rows
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Draft(DataclassState):
    """The State before a call, the State after it, and what the call read, a row a slot."""

    before: State
    after: State
    x: Tensor  # (N, L, D)
    length: Tensor  # (N,) tokens of the call
    written: Tensor  # (N,) bool: a document of the call names this slot
    fresh: Tensor  # (N,) bool
    fields: Fields  # (N, L)
    ids: Tensor | None  # (N, L, S)
    memories: Mapping[str, tuple[Tensor, Tensor, Fields]]  # (N, S, D), lengths (N,), (N, S)
    published: Mapping[str, Tensor]  # (N, L, ...) what earlier layers left at each position
    ctx: Ctx  # of the call, whose layout is not used again
    forward: Callable[[Tensor, Ctx, State], Any]  # of the layer, to its `Out`

    def commit(self) -> State:
        return self.after

    def accept(self, n_N: Tensor) -> State:
        n = torch.minimum(n_N.to(self.length), self.length)
        L = self.x.shape[1]
        if not L:
            return self.after  # nothing was fed
        taken = (torch.arange(L, device=n.device) < n[:, None]) & self.written[:, None]
        memories = {}
        for name, (x, length, fields) in self.memories.items():
            there = torch.arange(x.shape[1], device=n.device) < length[:, None]
            layout = self._rows(fields, there & self.written[:, None])
            memories[name] = Memory(layout, self.ctx.memories[name].mask, x)
        layout = self._rows(self.fields, taken)
        ctx = replace(
            self.ctx, layout=layout, ids=self.ids, memories=memories, published=self.published
        )
        return self.forward(self.x, ctx, self.before.fork()).state

    def _rows(self, fields: Fields, taken_NL: Tensor) -> Layout:
        """Row i is document i + 1, of slot i."""
        N, L = taken_NL.shape
        here = torch.arange(N, device=taken_NL.device)
        document = torch.where(taken_NL, here[:, None] + 1, 0).to(torch.int32)
        return Layout(
            fields._replace(document=document),
            cu_seqlens=torch.arange(N + 1, dtype=torch.int32, device=here.device) * L,
            slot=torch.where(self.written, here, -1).to(torch.int32),
            fresh=self.fresh,
            max_seqlen=L,
            aligned=True,
        )


def draft_call(
    forward: Callable[[Tensor, Ctx, State], Any], x_BTD: Tensor, ctx: Ctx, state: State
) -> Any:
    """Run a layer's ``forward``; the State of the `Out` can accept a prefix of the call.

    Args:
        forward: of the layer; it sees no draft.
        state: consumed.
    """
    before, plain = state.fork(), replace(ctx, draft=False)
    out = forward(x_BTD, plain, state)
    N = next(before.leaves()).shape[0]
    docs = PackedRows.of(ctx.layout, N)
    w = docs.slot_writes()
    rows = lambda t: w.take(docs.unpack(t))
    memories = {}
    for name, memory in ctx.memories.items():
        there = memory_rows(memory.layout, ctx.layout, N)
        own = there.slot_writes()
        take = lambda t, r=there, own=own: own.take(r.unpack(t))
        memories[name] = take(memory.x), own.length, memory.layout.fields.map(take)
    draft = Draft(
        before,
        out.state,
        rows(x_BTD),
        w.length,
        w.hit,
        w.fresh,
        ctx.layout.fields.map(rows),
        rows(ctx.ids) if ctx.ids is not None else None,
        memories,
        {k: rows(v) for k, v in ctx.published.items() if isinstance(v, Tensor)},
        plain,
        forward,
    )
    after = replace(out.ctx, draft=True) if out.ctx is not None else None
    return out._replace(state=draft, ctx=after)
