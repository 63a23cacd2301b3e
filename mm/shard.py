"""One process's slice of the tokens of a batch: what it holds, and where its documents go on.

B rows, T tokens of a whole row, t = T / size of a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.layout import Layout


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank ``rank`` of ``size`` holds tokens ``[rank * t, (rank + 1) * t)`` of every row.

    The layout of a slice numbers its own documents and takes each for a whole one; what crosses
    its ends is said here. Made on the host (`Shard.of`).
    """

    rank: int
    size: int
    group: Any  # of torch.distributed: the processes that share the rows
    whole: Layout  # of all tokens
    # (size, B) bool: the row's last document in a slice began before that slice. It then fills it.
    passes: Tensor
    # Documents that began before this slice, one at the start of its row; None where there is none.
    head: Layout | None
    tail: Layout  # the last document of each row
    earlier: Tensor  # (B,) int32 tokens that the row's first document has before the slice
    begins: bool  # a document begins in this slice
    through: bool  # one fills it that began before it
    alone: bool  # all that it holds are the last documents of rows
    ids: Tensor | None = None  # (B, T, S) of all tokens, for fields that are made of them

    @property
    def tokens(self) -> int:
        """t, tokens of a slice."""
        return self.whole.shape[1] // self.size

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Shard:
        """Every tensor, by a function of each."""
        return replace(
            self,
            whole=self.whole.map_tensors(move),
            passes=move(self.passes),
            head=self.head.map_tensors(move) if self.head is not None else None,
            tail=self.tail.map_tensors(move),
            earlier=move(self.earlier),
            ids=move(self.ids) if self.ids is not None else None,
        )

    def slice(self, x_BT: Tensor) -> Tensor:
        """The own part of ``(B, T, ...)``."""
        return x_BT[:, self.rank * self.tokens : (self.rank + 1) * self.tokens]

    def own(self, places: Tensor, missing: int) -> Tensor:
        """Flat places of whole rows as those of the slice; ``missing`` where it has not got them.

        Places past the rows are missing, too.
        """
        (B, T), t = self.whole.shape, self.tokens
        row, at = places // T, places % T - self.rank * t
        return torch.where((at >= 0) & (at < t) & (row < B), row * t + at, missing)

    def before(self, x_BT: Tensor, n: int) -> Tensor:
        """The ``n`` tokens before the slice of ``(B, T, ...)``; zeros before the row's start."""
        first = self.rank * self.tokens
        found = x_BT[:, max(0, first - n) : first]
        missing = x_BT.new_zeros(x_BT.shape[0], n - found.shape[1], *x_BT.shape[2:])
        return torch.cat((missing, found), 1)

    def with_fields(
        self, make: Callable[[Layout, Tensor | None], Layout], own: Layout
    ) -> tuple[Shard, Layout]:
        """Other named fields: ``make`` finds them for a layout and its ids, of all tokens.

        Returns this with that layout, and ``own``, the layout of the slice, with its part of them.
        """
        whole = make(self.whole, self.ids)
        if whole is self.whole:
            return self, own
        extra = {name: self.slice(x) for name, x in whole.fields.extra.items()}
        put = lambda f: f._replace(extra={k: x.to(f.document.device) for k, x in extra.items()})
        return replace(self, whole=whole), own.map_fields(put)

    @staticmethod
    def of(whole: Layout, rank: int, size: int, group: Any = None) -> tuple[Shard, Layout]:
        """The shard of a layout in host memory, and the layout of its slice.

        Raises:
            ValueError: ``size`` does not divide T.
        """
        B, T = whole.shape
        if T % size:
            raise ValueError(f"{T} tokens do not divide over {size} processes")
        t = T // size
        document = whole.fields.document.numpy()
        ends = np.arange(1, size + 1) * t - 1
        # Of each slice: the document before it, which is the last one of the slice, too.
        before = np.pad(document, ((0, 0), (1, 0)))[:, ends - t + 1]
        passes = ((before == document[:, ends]) & (before > 0)).T
        mine = document[:, rank * t : (rank + 1) * t]
        old = before[:, rank]
        goes_on = (mine == old[:, None]) & (mine > 0)
        earlier = (document[:, : rank * t] == old[:, None]).sum(1) * goes_on[:, 0]
        row = np.arange(1, B + 1, dtype=np.int32)[:, None]
        made = Shard(
            rank,
            size,
            group,
            whole,
            torch.from_numpy(np.ascontiguousarray(passes)),
            _rows(whole, rank, t, goes_on * row, ~goes_on[:, 0]) if goes_on.any() else None,
            _rows(whole, rank, t, ((mine == mine[:, -1:]) & (mine > 0)) * row, ~passes[rank]),
            torch.from_numpy(earlier.astype(np.int32)),
            bool(((mine > 0) & ~goes_on).any()),
            bool(passes[rank].any()),
            bool(((mine == mine[:, -1:]) | (mine == 0)).all()),
        )
        return made, _slice(whole, rank, t)


def _fields(whole: Layout, rank: int, t: int, document: np.ndarray) -> Any:
    fields = whole.fields.map(lambda x: x[:, rank * t : (rank + 1) * t].contiguous())
    return fields._replace(document=torch.from_numpy(document.astype(np.int32)))


def _slice(whole: Layout, rank: int, t: int) -> Layout:
    """Documents of a slice, each as a whole one, under numbers of the slice."""
    mine = whole.fields.document.numpy()[:, rank * t : (rank + 1) * t]
    new = np.pad(mine[:, 1:] != mine[:, :-1], ((0, 0), (1, 0)), constant_values=True) & (mine > 0)
    number = np.cumsum(new).reshape(mine.shape) * (mine > 0)
    M = whole.slot.shape[0]
    starts = np.full(M + 1, mine.size, np.int32)
    first = np.flatnonzero(new)
    starts[: len(first)] = first
    longest = int(np.bincount(number.reshape(-1), minlength=2)[1:].max())
    none = torch.full((M,), -1, dtype=torch.int32)
    fields = _fields(whole, rank, t, number)
    return Layout(fields, torch.from_numpy(starts), none, torch.ones(M, dtype=torch.bool), longest)


def _rows(whole: Layout, rank: int, t: int, document: np.ndarray, fresh: np.ndarray) -> Layout:
    """At most one document of each row, numbered and slotted by it."""
    B = len(document)
    there = document > 0
    at_start = bool(np.all(there[:, 0] | ~there.any(1)))
    starts = np.arange(B) * t + np.where(there.any(1), there.argmax(1), 0)
    longest = t if at_start else max(1, int(there.sum(1).max(initial=0)))
    return Layout(
        _fields(whole, rank, t, document),
        torch.from_numpy(np.append(starts, B * t).astype(np.int32)),
        torch.arange(B, dtype=torch.int32),
        torch.from_numpy(fresh.copy()),
        longest,
        aligned=at_start,
    )
