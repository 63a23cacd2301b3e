"""Documents of a packed call as rows of their own, and what a State's slots read and write.

B rows, T tokens, M documents, N slots, R regrouped rows, L their length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mm.layout import Fields, Layout
from mm.mask import Causal, Mask, Window
from mm.model.context import Ctx
from mm.model.length_buckets import document_groups
from mm.state import DataclassState, map_tree

S = TypeVar("S", bound=DataclassState)


def narrow_mask(mask: Mask, window: int | None) -> Mask:
    """``mask`` and a layer's own window, in the simplest form that says both."""
    if window is None:
        return mask
    if isinstance(mask, Causal):
        return Window(window)
    if isinstance(mask, Window):
        return Window(min(window, mask.size))
    return mask & Window(window)


def pieces(size: int, *given: Tensor | None) -> list[tuple[Any, ...]]:
    """Pieces of ``size`` positions along dimension 1 of all that is not None, in order.

    Cut at once: a slice for each piece has a gradient of the whole length each, O(T^2) together.
    """
    length = next(x.shape[1] for x in given if x is not None)
    n = -(-length // size)
    return list(
        zip(*([None] * n if x is None else x.split(size, 1)[:n] for x in given), strict=True)
    )


def refuse_overflow(outgrown: Tensor, capacity: int) -> None:
    """Refuse documents longer than the State that `initial_state` made for them.

    Raises:
        ValueError: on a CPU. An accelerator is not waited for: it stops the run when it gets here.
    """
    message = (
        f"a document outgrew its State of {capacity} tokens; give initial_state a larger max_len"
    )
    if outgrown.device.type != "cpu":
        torch.ops.aten._assert_async.msg(~outgrown.any(), message)
    elif bool(outgrown.any()):
        raise ValueError(message)


def merge_fields(f: Callable[[Tensor, Tensor], Tensor], a: Fields, b: Fields) -> Fields:
    """Apply ``f`` to each field of both sides; a side that lacks a named field has zeros there."""
    names = dict.fromkeys((*a.extra, *b.extra))
    return Fields(
        f(a.position, b.position),
        f(a.document, b.document),
        f(a.modality, b.modality),
        {
            n: f(
                a.extra.get(n, torch.zeros_like(a.document)),
                b.extra.get(n, torch.zeros_like(b.document)),
            )
            for n in names
        },
    )


def per_document(f: Callable[..., Tensor], ctx: Ctx, *x_BT: Tensor) -> Tensor:
    """Run a causal ``f`` on documents that all begin in this call.

    ``f`` takes rows of one document `(R, L, ...)`, one for each tensor `(B, T, ...)`, and returns
    their outputs `(R, L, ...)`; rows may end in copies of the document's last position.

    Returns:
        Outputs `(B, T, ...)`.
    """
    groups = document_groups(ctx)
    if groups is None:
        docs = PackedRows.of(ctx.layout, 0)
        return docs.pack(f(*map(docs.unpack, x_BT)))
    return groups.join([f(*parts) for _, parts in groups.split(*x_BT)], *ctx.layout.shape)


class PackedRows(NamedTuple):
    """Documents of a call with a State, as R rows of length L: row r is document r + 1."""

    index: (
        Tensor | None
    )  # (R, L) flat indices, None when row r of the call is document r + 1 already
    valid: Tensor  # (R, L) bool
    length: Tensor  # (R,) int64
    slot: Tensor  # (R,) int64, -1 = none
    fresh: Tensor  # (R,) bool
    direct: bool  # row r has slot r or none, and there are R slots: states need no gather
    slots: int  # N
    layout: Layout

    def own_slots(self) -> bool:
        """Whether every row has a slot of its own, in order; asks no device."""
        slot = lambda: self.layout.arrays().slot[: self.slots]
        known = lambda: self.direct and bool((slot() >= 0).all())
        return self.layout.cached(known, "own slots", self.slots)

    def all_fresh(self) -> bool:
        """Whether every slot is this call's, from its beginning; asks no device."""
        known = lambda: self.own_slots() and bool(self.layout.arrays().fresh[: self.slots].all())
        return self.layout.cached(known, "all fresh", self.slots)

    def some_fresh(self) -> bool:
        """Whether a document begins here; asks no device."""
        return self.layout.cached(lambda: bool(self.layout.arrays().fresh.any()), "some fresh")

    @staticmethod
    def of(layout: Layout, n_slots: int) -> PackedRows:
        """Rows of ``layout`` for a State of ``n_slots``; layers of a pass share them.

        No synchronisation: L is `Layout.max_seqlen`.
        """
        return layout.cached(lambda: PackedRows._make_of(layout, n_slots), "rows", n_slots)

    @staticmethod
    def _make_of(layout: Layout, n_slots: int) -> PackedRows:
        B, T = layout.shape
        document = layout.fields.document
        if layout.aligned:
            valid = document > 0
            slot, fresh = layout.slot[:B].long(), layout.fresh[:B]
            return PackedRows(None, valid, valid.sum(1), slot, fresh, n_slots == B, n_slots, layout)
        M = layout.slot.shape[0]
        flat = document.reshape(-1).long()
        count = flat.new_zeros(M + 1).index_add_(0, flat, torch.ones_like(flat))[1:]
        positions = torch.arange(layout.max_seqlen, device=flat.device)
        valid = positions < count[:, None]
        start = layout.cu_seqlens[:-1].long()
        last = (start + count - 1).clamp_min(0)
        index = torch.minimum(start[:, None] + positions, last[:, None]).clamp_max(B * T - 1)
        slot, fresh = layout.slot.long(), layout.fresh
        return PackedRows(index, valid, count, slot, fresh, False, n_slots, layout)

    def unpack(self, x_BT: Tensor) -> Tensor:
        """`(B, T, ...)` to `(R, L, ...)`; past a document's end its own last position repeats."""
        return x_BT if self.index is None else x_BT.flatten(0, 1)[self.index]

    def pack(self, y_RL: Tensor) -> Tensor:
        """Inverse of `unpack`; padding gets zeros."""
        if self.index is None:
            return y_RL
        B, T = self.layout.shape
        # Invalid positions write into one index past the end, which is cut off.
        index = torch.where(self.valid, self.index, B * T).reshape(-1)
        out = y_RL.new_zeros(B * T + 1, *y_RL.shape[2:]).index_copy(0, index, y_RL.flatten(0, 1))
        return out[:-1].view(B, T, *y_RL.shape[2:])

    def fields(self, f: Fields) -> Fields:
        """Fields of the rows; ``document`` is 1 at tokens, 0 elsewhere.

        A row holds one document.
        """
        made = lambda: f.map(self.unpack)._replace(document=self.valid.to(torch.int32))
        of = f.position, f.document, f.modality, *f.extra, *f.extra.values()
        return self.layout.cached(made, "row fields", self.valid, *of)

    def read(self, leaf_N: Tensor, initial: Tensor | float = 0.0) -> Tensor:
        """`(N, ...)` state to what each row begins from, `(R, ...)`.

        ``initial`` for fresh rows and rows without a slot.
        """
        shape = (-1, *[1] * (leaf_N.dim() - 1))
        keep = ((self.slot >= 0) & ~self.fresh).view(shape)
        rows = leaf_N if self.direct else leaf_N.index_select(0, self.slot.clamp_min(0))
        # Selected, not multiplied: a stale slot may hold inf.
        return torch.where(keep, rows, initial)

    def last(self, h_RL: Tensor, before_R: Tensor) -> Tensor:
        """`(R, ...)` of the last token of each row; ``before`` where a row has none."""
        if not h_RL.shape[1]:
            return before_R
        shape = (-1, *[1] * (h_RL.dim() - 1))
        index = (self.length - 1).clamp_min(0).view(shape).expand(-1, 1, *h_RL.shape[2:])
        return torch.where(
            (self.length > 0).view(shape[:-1]), h_RL.gather(1, index)[:, 0], before_R
        )

    def write(self, state: S, **rows_R: Any) -> S:
        """``state`` after a call that left ``rows`` `(R, ...)` in its leaves of those names."""
        w = self.slot_writes()
        new = {name: map_tree(w.write, getattr(state, name), rows) for name, rows in rows_R.items()}
        return replace(state, **new)  # type: ignore[type-var]

    def slot_writes(self) -> SlotWrites:
        """Which row each slot takes over."""
        of = self.slots, self.slot, self.length, self.fresh
        return self.layout.cached(self._slot_writes, "slot writes", *of)

    def _slot_writes(self) -> SlotWrites:
        n_slots = self.slots
        if self.direct:
            length = torch.where(self.slot >= 0, self.length, 0)
            return SlotWrites(None, self.slot >= 0, length, self.fresh & (self.slot >= 0))
        rows = torch.arange(self.slot.shape[0], device=self.slot.device)
        target = torch.where(self.slot >= 0, self.slot, n_slots)
        row = torch.full((n_slots + 1,), -1, dtype=torch.long, device=target.device)
        row = row.scatter_reduce(0, target, rows, "amax")[
            :n_slots
        ]  # the last document naming a slot wins
        hit = row >= 0
        row = row.clamp_min(0)
        if rows.shape[0] == 0:
            return SlotWrites(row, hit, torch.zeros_like(row), hit)
        return SlotWrites(row, hit, torch.where(hit, self.length[row], 0), self.fresh[row] & hit)


def memory_rows(memory: Layout, reader: Layout, n_slots: int) -> PackedRows:
    """The documents of a memory as rows, in the order of the reader's rows."""
    aligned = memory.aligned and reader.aligned
    rows = PackedRows.of(replace(memory, aligned=aligned), n_slots)
    if aligned or not reader.aligned:
        return rows
    n = reader.shape[0]
    assert rows.index is not None
    return rows._replace(
        index=rows.index[:n], valid=rows.valid[:n], length=rows.length[:n],
        slot=rows.slot[:n], fresh=rows.fresh[:n],
    )  # fmt: skip


class SlotWrites(NamedTuple):
    """What each slot is written from."""

    row: Tensor | None  # (N,) int64
    hit: Tensor  # (N,) bool
    length: Tensor  # (N,) int64
    fresh: Tensor  # (N,) bool

    def take(self, rows: Tensor) -> Tensor:
        """`(R, ...)` to `(N, ...)`: each slot's row (any row where no document names the slot)."""
        if self.row is None:
            return rows
        if rows.shape[0] == 0:
            return rows.new_zeros(self.row.shape[0], *rows.shape[1:])
        return rows.index_select(0, self.row)

    def write(self, old_N: Tensor, rows: Tensor) -> Tensor:
        """`(N, ...)` new state: the row's value where a document named the slot.

        Elsewhere the old one, bit for bit.
        """
        return torch.where(
            self.hit.view(-1, *[1] * (old_N.dim() - 1)), self.take(rows).to(old_N.dtype), old_N
        )
