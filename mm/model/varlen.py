"""Documents of a packed call as rows of their own, and what a State's slots read and write.

B rows, T tokens, M documents, N slots, R regrouped rows, L their length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm.kernels.attention.spec import MaskSpec
from mm.layout import Fields, Layout
from mm.mask import Causal, Mask, Prefix, Window
from mm.model.context import Ctx

# Attention on a CPU takes documents where they lie if they have so many tokens on average: to
# gather a token costs about 8 us, a call of its own for a document 0.3 ms.
MIN_TOKENS_IN_PLACE, MAX_RUNS = 128, 64


def narrowed(mask: Mask, window: int | None) -> Mask:
    """``mask`` and a layer's own window, in the simplest form that says both."""
    if window is None:
        return mask
    if isinstance(mask, Causal):
        return Window(window)
    if isinstance(mask, Window):
        return Window(min(window, mask.size))
    return mask & Window(window)


def pieces(size: int, *given: Tensor | None) -> list[tuple[Any, ...]]:
    """Pieces of ``size`` places along dimension 1 of all that is not None, in order.

    Cut at once: a slice for each piece has a gradient of the whole length each, O(T^2) together.
    """
    length = next(x.shape[1] for x in given if x is not None)
    n = -(-length // size)
    return list(
        zip(*([None] * n if x is None else x.split(size, 1)[:n] for x in given), strict=True)
    )


def paired(f: Callable[[Tensor, Tensor], Tensor], a: Fields, b: Fields) -> Fields:
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


class _Regroup(torch.autograd.Function):
    """Row gather whose backward is a row gather: every place that counts occurs once on either
    side.

    ``unread`` marks the rows of ``x`` that no place reads (copies that pad a group): their gradient
    is zero, not that of the place they copy.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, unread: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(index, inverse, unread)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        index, inverse, unread = ctx.saved_tensors
        back = _Regroup.apply(grad, inverse, index)
        if unread is not None:
            back = back.masked_fill(unread[:, None], 0)
        return back, None, None, None


class Group(NamedTuple):
    """Documents of similar length, one a row. ``allowed`` None and ``causal`` say what the mask
    amounts to here; groups made ``by_vectors`` say it in ``mask`` alone.
    """

    rows: int
    length: int
    allowed: Tensor | None  # (R or 1, L, L) bool
    causal: bool
    mask: MaskSpec | None = None


def _mask_spec(
    mask: Mask, f: Fields, causal: bool, ordered: bool, steady: bool, filled: bool
) -> MaskSpec:
    """Return what ``mask`` amounts to in rows of one document whose padding is last.

    ``ordered``: times grow; ``steady``: by one; ``filled``: there is no padding.
    """
    if causal:
        return MaskSpec(causal=True)
    if isinstance(mask, Window) and steady:
        return MaskSpec(causal=True, window=mask.size)
    if isinstance(mask, Prefix) and ordered:
        group = f.extra[mask.name] * (f.document != 0)
        return MaskSpec(causal=True, prefix_RT=group, prefix_RS=group)
    if mask.hint == "full":
        return MaskSpec() if filled else MaskSpec(document_RT=f.document, document_RS=f.document)
    return MaskSpec(mask.dense(f, f))


def _runs(first: np.ndarray, count: np.ndarray) -> list[tuple[int, int, int]]:
    """First place, number and length of documents of one length that follow each other; none where
    gathering documents costs less.
    """
    if count.sum() < MIN_TOKENS_IN_PLACE * len(count):
        return []
    same = (np.diff(count) == 0) & (np.diff(first) == count[:-1])
    begins = np.flatnonzero(np.concatenate([[True], ~same]))
    if len(begins) > MAX_RUNS:
        return []
    number = np.diff(begins, append=len(count))
    return [(int(first[b]), int(n), int(count[b])) for b, n in zip(begins, number, strict=True)]


@dataclass(frozen=True, slots=True)
class LengthBuckets:
    """A stateless packed call as groups of one-document rows (`LengthBuckets.of`). With ``runs``
    each group is a range of flat places; else, with ``index`` None, the rows are groups already.
    """

    groups: tuple[Group, ...]
    index: Tensor | None = (
        None  # (sum of R * L + 1,) flat places; the last row stands for all padding
    )
    inverse: Tensor | None = None  # (B * T,) where each place went
    unread: Tensor | None = None  # (sum of R * L + 1,) bool: copies that pad a group
    runs: tuple[tuple[int, int], ...] = ()

    def _sizes(self, places: int) -> list[int]:
        """Of what lies before the first run, the run, what lies between it and the next, .."""
        ends = [0, *(end for run in self.runs for end in run), places]
        return [b - a for a, b in pairwise(ends)]

    def split(self, *x_BT: Tensor) -> Iterator[tuple[Group, list[Tensor]]]:
        """Yield each group with `(R, L, ...)` views of each `(B, T, ...)` tensor."""
        if self.runs:
            flat = [x.flatten(0, 1) for x in x_BT]
            # Split, not sliced: the backward of a slice writes a whole zero tensor.
            pieces = [x.split(self._sizes(len(x)))[1::2] for x in flat]
            for i, group in enumerate(self.groups):
                yield group, [p[i].unflatten(0, (group.rows, group.length)) for p in pieces]
            return
        if self.index is None:
            yield self.groups[0], list(x_BT)
            return
        sizes = [group.rows * group.length for group in self.groups]
        # The last row is no place's: padding gets its gradient, which is zero.
        flat = [
            _Regroup.apply(x.reshape(x.shape[0] * x.shape[1], -1), self.index, self.inverse).split(
                [*sizes, 1]
            )
            for x in x_BT
        ]
        for i, group in enumerate(self.groups):
            yield (
                group,
                [
                    f[i].view(group.rows, group.length, *x.shape[2:])
                    for f, x in zip(flat, x_BT, strict=True)
                ],
            )

    def join(self, y: list[Tensor], B: int, T: int) -> Tensor:
        """Inverse of `split` for one tensor: `(R, L, ...)` of every group to `(B, T, ...)`."""
        if self.runs:
            kept = [part.flatten(0, 1) for part in y]
            gaps = [kept[0].new_zeros(n, *kept[0].shape[1:]) for n in self._sizes(B * T)[::2]]
            done = [x for both in zip(gaps, [*kept, gaps[-1][:0]], strict=True) for x in both]
            done = [x for x in done if len(x)]
            return (torch.cat(done) if len(done) > 1 else done[0]).unflatten(0, (B, T))
        if self.index is None:
            return y[0]
        parts = [part.reshape(part.shape[0] * part.shape[1], -1) for part in y]
        # The last row is what padding reads.
        out = _Regroup.apply(
            torch.cat((*parts, parts[0].new_zeros(1, parts[0].shape[1]))),
            self.inverse,
            self.index,
            self.unread,
        )
        return out.view(B, T, *y[0].shape[2:])

    @staticmethod
    def of(
        layout: Layout, mask: Mask, split_above: int = 16, by_vectors: bool = False
    ) -> LengthBuckets:
        """Group the documents of ``layout`` by length (powers of two from ``split_above``).

        ``by_vectors``: give `Group.mask`, which has a bool of all pairs only where nothing smaller
        says the same.

        Runs on the host, once per pass: on an accelerator it costs one synchronisation.
        """
        B, T = layout.shape
        f = layout.fields
        document = f.document.reshape(-1).cpu().numpy()
        time = f.position[..., 0].reshape(-1).cpu().numpy()
        starts = layout.cu_seqlens[:-1].cpu().numpy()
        lengths = np.bincount(document, minlength=len(starts) + 1)[1:]
        same = (document[1:] == document[:-1]) & (document[1:] > 0)
        apart = (time[1:] - time[:-1])[same]
        ordered, steady = not (apart <= 0).any(), not (apart != 1).any()
        real = lengths > 0
        first, last = starts[real], starts[real] + lengths[real] - 1
        span = int((time[last] - time[first]).max(initial=0)) + 1
        causal = ordered and (
            mask.hint == "causal" or (mask.hint == "window" and span <= (mask.reach or 0))
        )
        if layout.aligned or not real.any() or (real.sum() == B and (first % T == 0).all()):
            full = mask.hint == "full" and bool((document > 0).all())
            if by_vectors:
                spec = _mask_spec(mask, f, causal, ordered, steady, bool((document > 0).all()))
                return LengthBuckets((Group(B, T, None, False, spec),))
            allowed = None if causal or full else mask.dense(f, f)
            return LengthBuckets((Group(B, T, allowed, causal),))
        runs = _runs(first, lengths[real]) if by_vectors and f.document.device.type == "cpu" else []
        if runs:
            made = []
            for start, R, L in runs:
                lying = lambda t, a=start, n=R, m=L: t.flatten(0, 1)[a : a + n * m].unflatten(
                    0, (n, m)
                )
                spec = _mask_spec(mask, f.map(lying), causal, ordered, steady, True)
                made.append(Group(R, L, None, False, spec))
            return LengthBuckets(tuple(made), runs=tuple((a, a + n * m) for a, n, m in runs))
        size = np.full(len(first), split_above)
        while (short := size < lengths[real]).any():
            size[short] *= 2
        groups, indices, unread, at = [], [], [], 0
        inverse = np.zeros(B * T, np.int64)
        for width in np.unique(size):
            chosen = size == width
            start, count = first[chosen], lengths[real][chosen]
            L = int(count.max())
            # Padding repeats the document's own last place: never a neighbour's, which might be
            # inf.
            index = start[:, None] + np.minimum(np.arange(L), count[:, None] - 1)
            valid = np.arange(L) < count[:, None]
            inverse[index[valid]] = at + np.flatnonzero(valid.reshape(-1))
            allowed = spec = None
            if by_vectors or not (causal or (mask.hint == "full" and valid.all())):
                gathered = f.map(
                    lambda t, i=torch.from_numpy(index).to(f.document.device): t.flatten(0, 1)[i]
                )
                inside = torch.from_numpy(valid).to(f.document.device)
                gathered = gathered._replace(document=gathered.document * inside)
                if by_vectors:
                    spec = _mask_spec(mask, gathered, causal, ordered, steady, bool(valid.all()))
                else:
                    allowed = mask.dense(gathered, gathered)
            groups.append(Group(len(start), L, allowed, causal and not by_vectors, spec))
            indices.append(index.reshape(-1))
            unread.append(~valid.reshape(-1))
            at += index.size
        device = f.document.device
        inverse[document == 0] = at
        index = torch.from_numpy(np.concatenate([*indices, [0]])).to(device)
        copies = torch.from_numpy(np.concatenate([*unread, [True]])).to(device)
        return LengthBuckets(tuple(groups), index, torch.from_numpy(inverse).to(device), copies)


def document_groups(ctx: Ctx) -> LengthBuckets | None:
    """The call's documents grouped by length, once for all layers of a pass; None inside a graph
    unless they were grouped before it.
    """
    return ctx.cached_on_host(
        "varlen.documents", lambda layout, mask: LengthBuckets.of(layout, Causal())
    )


def per_document(f: Callable[..., Tensor], ctx: Ctx, *x_BT: Tensor) -> Tensor:
    """Run a causal ``f`` on documents that all begin in this call.

    ``f`` takes rows of one document `(R, L, ...)`, one for each tensor `(B, T, ...)`, and returns
    their outputs `(R, L, ...)`; rows may end in copies of the document's last place.

    Returns:
        Outputs `(B, T, ...)`.
    """
    B, T = x_BT[0].shape[:2]
    groups = document_groups(ctx)
    if groups is None:
        docs = PackedRows.of(ctx.layout, 0)
        return docs.pack(f(*map(docs.unpack, x_BT)), B, T)
    return groups.join([f(*parts) for _, parts in groups.split(*x_BT)], B, T)


class PackedRows(NamedTuple):
    """Documents of a call with a State, as R rows of length L: row r is document r + 1."""

    index: (
        Tensor | None
    )  # (R, L) flat places, None when row r of the call is document r + 1 already
    valid: Tensor  # (R, L) bool
    length: Tensor  # (R,) int64
    slot: Tensor  # (R,) int64, -1 = none
    fresh: Tensor  # (R,) bool
    direct: bool  # row r has slot r or none, and there are R slots: states need no gather

    @staticmethod
    def of(layout: Layout, n_slots: int) -> PackedRows:
        """Rows of ``layout`` for a State of ``n_slots``. No synchronisation: L is
        `Layout.max_seqlen`.
        """
        B, T = layout.shape
        document = layout.fields.document
        if layout.aligned:
            valid = document > 0
            return PackedRows(
                None, valid, valid.sum(1), layout.slot[:B].long(), layout.fresh[:B], n_slots == B
            )
        M = layout.slot.shape[0]
        flat = document.reshape(-1).long()
        count = flat.new_zeros(M + 1).index_add_(0, flat, torch.ones_like(flat))[1:]
        places = torch.arange(layout.max_seqlen, device=flat.device)
        valid = places < count[:, None]
        start = layout.cu_seqlens[:-1].long()
        last = (start + count - 1).clamp_min(0)
        index = torch.minimum(start[:, None] + places, last[:, None]).clamp_max(B * T - 1)
        return PackedRows(index, valid, count, layout.slot.long(), layout.fresh, False)

    def unpack(self, x_BT: Tensor) -> Tensor:
        """`(B, T, ...)` to `(R, L, ...)`; places past a document's end repeat its own last one."""
        return x_BT if self.index is None else x_BT.flatten(0, 1)[self.index]

    def pack(self, y_RL: Tensor, B: int, T: int) -> Tensor:
        """Inverse of `unpack`; padding gets zeros."""
        if self.index is None:
            return y_RL
        # Invalid places write into one place past the end, which is cut off.
        index = torch.where(self.valid, self.index, B * T).reshape(-1)
        out = y_RL.new_zeros(B * T + 1, *y_RL.shape[2:]).index_copy(0, index, y_RL.flatten(0, 1))
        return out[:-1].view(B, T, *y_RL.shape[2:])

    def fields(self, f: Fields) -> Fields:
        """Fields of the rows; ``document`` is 1 at valid places, 0 elsewhere (a row holds one
        document).
        """
        return f.map(self.unpack)._replace(document=self.valid.to(torch.int32))

    def read(self, leaf_N: Tensor, initial: Tensor | float = 0.0) -> Tensor:
        """`(N, ...)` state to what each row begins from: `(R, ...)`, ``initial`` for fresh rows and
        rows without a slot.
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

    def written(self, n_slots: int) -> SlotWrites:
        """Which row each slot takes over."""
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


class SlotWrites(NamedTuple):
    """For every slot: the row that writes it (None = row n), whether any does, its length, whether
    it began fresh.
    """

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
        """`(N, ...)` new state: the row's value where a document named the slot, else the old one,
        bit for bit.
        """
        return torch.where(
            self.hit.view(-1, *[1] * (old_N.dim() - 1)), self.take(rows).to(old_N.dtype), old_N
        )
