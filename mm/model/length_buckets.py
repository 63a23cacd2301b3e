"""Documents of a packed call grouped by length, or left where they lie.

B rows, T tokens, M documents, R regrouped rows, L their length.
"""

from __future__ import annotations

from collections.abc import Iterator
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

# Attention on a CPU takes documents in place if they have so many tokens on average: to gather a
# token costs about 8 us, a call of its own for a document 0.3 ms.
MIN_TOKENS_IN_PLACE, MAX_RUNS = 128, 64
SHORTEST = 16  # tokens; documents of as many or fewer are one group
# Whether packed rows go to kernels as they are, with the borders of their documents. None: on an
# accelerator, where shapes that change with every batch cost more than what borders hide.
FLAT: bool | None = None


def stays_flat(layout: Layout) -> bool:
    """Whether layers that know borders take the packed rows of ``layout`` as they are."""
    if layout.aligned:
        return False
    return layout.fields.document.device.type != "cpu" if FLAT is None else FLAT


class Regroup(torch.autograd.Function):
    """Row gather whose backward is a row gather.

    Every row that counts occurs once on either side.

    ``unread`` marks the rows of ``x`` that no position reads (copies that pad a group): their
    gradient is zero, not that of the position they copy.
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
        back = Regroup.apply(grad, inverse, index)
        if unread is not None:
            back = back.masked_fill(unread[:, None], 0)
        return back, None, None, None


class Group(NamedTuple):
    """Documents of similar length, one a row."""

    rows: int
    length: int
    mask: MaskSpec  # what the mask amounts to here


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


def _flat_spec(mask: Mask, layout: Layout, ordered: bool, steady: bool) -> MaskSpec | None:
    """What ``mask`` amounts to in whole rows, their documents in order; None: it has no short form.

    It depends on the kind of mask and no length, so that a compiled graph serves every batch.
    """
    f, (B, T) = layout.fields, layout.shape
    # Rows too: what pads a row, or fills it, must not lengthen the last document of the one before.
    rows = torch.arange(0, B * T, max(1, T), dtype=torch.int32, device=f.document.device)
    starts = torch.cat((layout.cu_seqlens, rows)).sort().values
    apart = MaskSpec(document_RT=f.document, document_RS=f.document, starts_M=starts)
    if mask.hint == "full":
        return apart
    if isinstance(mask, Causal) and ordered:
        return apart._replace(causal=True)
    if isinstance(mask, Window) and steady:
        return apart._replace(causal=True, window=mask.size)
    if isinstance(mask, Prefix) and ordered:
        group = f.extra[mask.name]
        return apart._replace(causal=True, prefix_RT=group, prefix_RS=group)
    return None


def _runs(first: np.ndarray, count: np.ndarray) -> list[tuple[int, int, int]]:
    """First index, number and length of documents of one length that follow each other.

    None where gathering documents costs less.
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
    """A stateless packed call as groups of one-document rows (`LengthBuckets.of`).

    With ``runs`` each group is a range of flat indices; else, with ``index`` None, the rows are
    groups already.
    """

    groups: tuple[Group, ...]
    index: Tensor | None = (
        None  # (sum of R * L + 1,) flat indices; the last row stands for all padding
    )
    inverse: Tensor | None = None  # (B * T,) where each position went
    unread: Tensor | None = None  # (sum of R * L + 1,) bool: copies that pad a group
    runs: tuple[tuple[int, int], ...] = ()

    def _sizes(self, positions: int) -> list[int]:
        """Of what lies before the first run, the run, what lies between it and the next, .."""
        ends = [0, *(end for run in self.runs for end in run), positions]
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
        # The last row is no position's: padding gets its gradient, which is zero.
        flat = [
            Regroup.apply(x.reshape(x.shape[0] * x.shape[1], -1), self.index, self.inverse).split(
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
        out = Regroup.apply(
            torch.cat((*parts, parts[0].new_zeros(1, parts[0].shape[1]))),
            self.inverse,
            self.index,
            self.unread,
        )
        return out.view(B, T, *y[0].shape[2:])

    @staticmethod
    def of(layout: Layout, mask: Mask, in_place: bool = False, flat: bool = False) -> LengthBuckets:
        """Group the documents of ``layout`` by length: powers of two from `SHORTEST` on.

        ``in_place``: on a CPU, take long documents where they are (`LengthBuckets.runs`).
        ``flat``: leave rows as they are where the mask has a short form with borders.

        Runs on the host, once per pass, and asks no device (`Layout.on_host`).
        """
        B, T = layout.shape
        f = layout.fields
        document, time, starts, lengths = layout.arrays()[:4]
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
            spec = _mask_spec(mask, f, causal, ordered, steady, bool((document > 0).all()))
            return LengthBuckets((Group(B, T, spec),))
        if flat and (spec := _flat_spec(mask, layout, ordered, steady)) is not None:
            return LengthBuckets((Group(B, T, spec),))
        runs = _runs(first, lengths[real]) if in_place and f.document.device.type == "cpu" else []
        if runs:
            made = []
            for start, R, L in runs:
                lying = lambda t, a=start, n=R, m=L: t.flatten(0, 1)[a : a + n * m].unflatten(
                    0, (n, m)
                )
                spec = _mask_spec(mask, f.map(lying), causal, ordered, steady, True)
                made.append(Group(R, L, spec))
            return LengthBuckets(tuple(made), runs=tuple((a, a + n * m) for a, n, m in runs))
        size = np.full(len(first), SHORTEST)
        while (short := size < lengths[real]).any():
            size[short] *= 2
        groups, indices, unread, at = [], [], [], 0
        inverse = np.zeros(B * T, np.int64)
        for width in np.unique(size):
            chosen = size == width
            start, count = first[chosen], lengths[real][chosen]
            L = int(count.max())
            # Padding repeats the document's own last position: never a neighbour's, which might be
            # inf.
            index = start[:, None] + np.minimum(np.arange(L), count[:, None] - 1)
            valid = np.arange(L) < count[:, None]
            inverse[index[valid]] = at + np.flatnonzero(valid.reshape(-1))
            spec = MaskSpec(causal=True)
            if not causal:
                at_index = torch.from_numpy(index).to(f.document.device)
                gathered = f.map(lambda t, i=at_index: t.flatten(0, 1)[i])
                inside = torch.from_numpy(valid).to(f.document.device)
                gathered = gathered._replace(document=gathered.document * inside)
                spec = _mask_spec(mask, gathered, causal, ordered, steady, bool(valid.all()))
            groups.append(Group(len(start), L, spec))
            indices.append(index.reshape(-1))
            unread.append(~valid.reshape(-1))
            at += index.size
        device = f.document.device
        inverse[document == 0] = at
        index = torch.from_numpy(np.concatenate([*indices, [0]])).to(device)
        copies = torch.from_numpy(np.concatenate([*unread, [True]])).to(device)
        return LengthBuckets(tuple(groups), index, torch.from_numpy(inverse).to(device), copies)


def document_groups(ctx: Ctx) -> LengthBuckets | None:
    """Group the call's documents by length, once for all layers of a pass.

    None inside a graph unless they were grouped before it.
    """
    return ctx.cached_on_host(
        "varlen.documents", lambda layout, mask: LengthBuckets.of(layout, Causal())
    )
