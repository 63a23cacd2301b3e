"""Where things stand in a batch: Fields of every place, and the Layout of documents.

B rows, T tokens, A axes, M documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

NONE: Mapping[str, Any] = {}
T = TypeVar("T")
# From a layout, the index and the document numbers that `Layout.derive` takes.
Moves: TypeAlias = "Callable[[Layout], tuple[Tensor | None, Tensor | None]]"


class Fields(NamedTuple):
    """ALL that a Mask or Position may know of a place.

    Queries have one, keys have one, a cache stores its own.
    """

    # (B, T, A) int32; axis 0 time, then row, column, frame, level; restarts per document. A place
    # outside of grids has its time on every axis; a cell of a grid has, on the axes of the grid,
    # the time of its first cell plus its row, column, ..: text alone reads as if it had one axis
    position: Tensor
    document: Tensor  # (B, T) int32, 1..M over the whole batch; 0 = padding
    modality: Tensor  # (B, T) int32; 0 = none
    extra: Mapping[str, Tensor] = NONE  # (B, T) int32, declared by name

    def map(self, f: Any) -> Fields:
        """Apply ``f`` to every tensor."""
        return Fields(
            f(self.position),
            f(self.document),
            f(self.modality),
            {k: f(v) for k, v in self.extra.items()},
        )


class Grid(NamedTuple):
    """Cells of a grid of codes inside a document, in raster order."""

    start: int  # its first place
    shape: tuple[int, ...]  # rows and columns, or more axes
    books: int = 1  # codes of a cell, one after another: each book is a grid in `Layout.grids`
    length: int | None = None  # codes that are there; None = all. Else it is not finished yet

    @property
    def codes(self) -> int:
        """How many there are, or will be."""
        return math.prod(self.shape) * self.books


class Doc(NamedTuple):
    """One document's places, for `Layout.from_rows`. Arrays are numpy; None takes the default."""

    length: int
    position: Any = None  # (length, A); default 0, 1, 2, ... from `start`, and the cells of `grids`
    modality: Any = None  # (length,)
    extra: Mapping[str, Any] = NONE
    slot: int = -1
    fresh: bool = True
    start: int = 0
    grids: Sequence[Grid] = ()


CACHED = 1024  # tokens up to which a document's default positions are kept: alike ones recur


def places_of(doc: Doc, axes: int) -> np.ndarray:
    """`(length, axes)` int32 default positions of a document (see `Fields.position`); read only."""
    make = _places if doc.length <= CACHED else _places.__wrapped__
    return make(doc.length, doc.start, tuple(doc.grids), axes)


@lru_cache(maxsize=1024)
def _places(length: int, start: int, grids: tuple[Grid, ...], axes: int) -> np.ndarray:
    time = start + np.arange(length, dtype=np.int32)
    position = np.repeat(time[:, None], axes, 1)
    for grid in grids:
        n = grid.codes if grid.length is None else min(grid.length, grid.codes)
        cells = cells_of(grid.shape, grid.books)[:n, : axes - 1]
        position[grid.start : grid.start + n, 1 : 1 + cells.shape[1]] = cells + (start + grid.start)
    position.setflags(write=False)
    return position


@lru_cache(maxsize=256)
def cells_of(shape: tuple[int, ...], books: int) -> np.ndarray:
    """The cell of each code of a grid, `(codes, axes)` int32; pictures are of few shapes."""
    cells = np.indices(shape, np.int32).reshape(len(shape), -1).T.repeat(books, 0)
    cells.setflags(write=False)
    return cells


class Arrays(NamedTuple):
    """What grouping documents on the host looks at (`Layout.arrays`); P = B * T positions."""

    document: np.ndarray  # (P,)
    time: np.ndarray  # (P,)
    start: np.ndarray  # (M,) first flat position of each document
    length: np.ndarray  # (M,) its tokens
    slot: np.ndarray  # (M,)
    fresh: np.ndarray  # (M,) bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Documents of a batch, made on the host.

    Document i + 1 begins at flat place ``cu_seqlens[i]`` of the row-major (B * T) places; the
    padding at the end of its
    row, if any, follows it and has ``fields.document == 0``. Entries after the last document hold B
    * T.
    """

    fields: Fields
    cu_seqlens: Tensor  # (M + 1,) int32
    slot: Tensor  # (M,) int32: State slot this document reads and writes; -1 = neither
    # (M,) bool: begins from the initial state. The last document naming a slot wins the write
    fresh: Tensor
    max_seqlen: int  # host int: longest document
    aligned: bool = (
        False  # host: row i holds document i + 1 alone, with slot i or none: decoding's common case
    )
    grids: Mapping[tuple[int, ...], Tensor] = field(
        default_factory=dict
    )  # (rows, cols, ..) -> (G, cells) int flat places of whole grids
    # What was computed from this layout alone (`Ctx.cached`). `dataclasses.replace` gives every
    # successor an empty one, so nothing made for one layout is ever read under another.
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.fields.document.shape[0], self.fields.document.shape[1]

    def to(self, device: Any) -> Layout:
        """Copy to a device; the copy remembers where it came from (`on_host`)."""
        return self.map_tensors(lambda t: t.to(device, non_blocking=True))

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Layout:
        """`to` by a function of each tensor."""
        made = replace(
            self,
            fields=self.fields.map(move),
            cu_seqlens=move(self.cu_seqlens),
            slot=move(self.slot),
            fresh=move(self.fresh),
            grids={k: move(v) for k, v in self.grids.items()},
        )
        if not made.is_on_host:
            made.memo["host"] = self.on_host
        return made

    @property
    def is_on_host(self) -> bool:
        return self.fields.document.device.type == "cpu"

    def on_host(self) -> Layout:
        """This layout in host memory, for what looks at values.

        Layouts are made on the host, so a copy on a device knows it without asking the device; one
        whose documents only the device knows (`derive` by a tensor) is read, which waits for it.
        """
        if self.is_on_host:
            return self
        found = self.memo.get("host")
        host = found() if found is not None else self.to("cpu")
        self.memo["host"] = lambda: host
        return host

    def arrays(self) -> Arrays:
        """What the host knows of the documents, as numpy, from `on_host`; made once."""
        if "arrays" not in self.memo:
            self.memo["arrays"] = self._arrays()
        return self.memo["arrays"]

    def _arrays(self) -> Arrays:
        host = self.on_host()
        document = host.fields.document.numpy().reshape(-1)
        time = host.fields.position.numpy()[..., 0].reshape(-1)
        starts, slot, fresh = (t.numpy() for t in (host.cu_seqlens, host.slot, host.fresh))
        lengths = np.bincount(document, minlength=len(starts))[1:]
        return Arrays(document, time, starts[:-1], lengths, slot, fresh)

    def cached(self, make: Callable[[], T], *of: Any) -> T:
        """What is made of this layout and ``of`` (a name, numbers, these very tensors), once.

        It makes no gradients. Inside a graph of `torch.compile` each caller makes its own.
        """
        if torch.compiler.is_compiling():
            return make()
        key = tuple([id(x) if isinstance(x, Tensor) else x for x in of])
        if key not in self.memo:
            with torch.no_grad():  # kept with its tensors: no number may come to stand for another
                self.memo[key] = of, make()
        return self.memo[key][1]

    def map_fields(self, f: Callable[[Fields], Fields]) -> Layout:
        """Other named fields for the same documents: ``f`` makes them from those that are there."""
        made = replace(self, fields=f(self.fields))
        if not made.is_on_host:
            made.memo["host"] = lambda: self.on_host().map_fields(f)
        return made

    def derive(
        self,
        index: Tensor | None = None,
        *,
        document: Tensor | None = None,
        again: Moves | None = None,
        time: Literal["moves", "stays"] = "moves",
        slots: bool = True,
    ) -> Layout:
        """The layout of the same content in other positions: the only way to make one from another.

        Use `mm.model.context.Ctx.derive`, which moves the ids along.

        Args:
            index: `(B * T,)` int64 permutation that stays inside documents and rows: flat position
                p then holds what stood at ``index[p]``. None: nothing moves.
            document: `(B, T)` int32 document numbers before the move; a position that loses its
                number becomes padding. None: as they are.
            again: makes ``index`` and ``document`` from any copy of this layout: so the host knows
                the result without asking the device (`on_host`).
            time: whether axis 0 of the positions moves with the content, or stays: then the new
                order is the order of time. Other axes, modality and named fields always move.
            slots: keep the slots of States; False: documents of the result read and write none.
        """
        f, grids = self.fields, self.grids
        if document is not None:
            f = f._replace(document=document)
        if index is not None:
            move = lambda t: t.flatten(0, 1)[index].view_as(t)
            moved = f.map(move)
            if time == "stays":
                position = torch.cat((f.position[..., :1], moved.position[..., 1:]), -1)
                moved = moved._replace(position=position)
            f = moved
            if grids:
                went = torch.empty_like(index)
                went[index] = torch.arange(len(index), device=index.device)
                grids = {k: went[v.long()].to(v.dtype) for k, v in grids.items()}
        made = replace(
            self,
            fields=f,
            cu_seqlens=first_places(f.document, self.slot.shape[0]),
            slot=self.slot if slots else torch.full_like(self.slot, -1),
            grids=grids,
        )
        if again is not None and not made.is_on_host and not torch.compiler.is_compiling():

            def host() -> Layout:
                layout = self.on_host()
                index, document = again(layout)
                return layout.derive(index, document=document, time=time, slots=slots)

            made.memo["host"] = host
        return made

    @staticmethod
    def from_rows(
        rows: Sequence[Sequence[Doc]],
        seq_len: int | None = None,
        max_documents: int | None = None,
        axes: int = 1,
    ) -> Layout:
        """Lay documents out, row by row, left to right, padding at the right of each row.

        Args:
            rows: documents of each of the B rows.
            seq_len: T; default the longest row.
            max_documents: static M, so that shapes do not change between batches; default the
                number of documents.
            axes: of positions that documents do not bring themselves.
        Raises:
            ValueError: a row is longer than ``seq_len`` or there are more than ``max_documents``.
        """
        used = [sum(d.length for d in row) for row in rows]
        T = seq_len if seq_len is not None else max(used, default=0)
        docs = [d for row in rows for d in row]
        M = max_documents if max_documents is not None else len(docs)
        if max(used, default=0) > T:
            raise ValueError(f"a row of {max(used)} tokens does not fit seq_len {T}")
        if len(docs) > M:
            raise ValueError(f"{len(docs)} documents do not fit max_documents {M}")
        B = len(rows)
        A = next((np.asarray(d.position).shape[1] for d in docs if d.position is not None), axes)
        names = sorted({name for d in docs for name in d.extra})
        position = np.zeros((B, T, A), np.int32)
        document, modality = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
        extra = {name: np.zeros((B, T), np.int32) for name in names}
        starts = np.full(M + 1, B * T, np.int32)
        slot, fresh = np.full(M, -1, np.int32), np.ones(M, bool)
        cells: dict[tuple[int, ...], list[np.ndarray]] = {}
        number = 0
        for b, row in enumerate(rows):
            at = 0
            # Of this row: to find an array's row anew for each document takes as long as to write.
            position_T, document_T, modality_T = position[b], document[b], modality[b]
            extra_T = {name: values[b] for name, values in extra.items()}
            for d in row:
                here = slice(at, at + d.length)
                position_T[here] = places_of(d, A) if d.position is None else d.position
                document_T[here] = number + 1
                if d.modality is not None:
                    modality_T[here] = d.modality
                for name, values in d.extra.items():
                    extra_T[name][here] = values
                starts[number], slot[number], fresh[number] = b * T + at, d.slot, d.fresh
                for grid in d.grids:
                    if grid.length is None or grid.length >= grid.codes:
                        places = b * T + at + grid.start + np.arange(grid.codes, dtype=np.int32)
                        cells.setdefault(grid.shape, []).append(places.reshape(-1, grid.books).T)
                number += 1
                at += d.length
        aligned = (
            len(docs) == B
            and all(len(row) == 1 for row in rows)
            and all(d.slot in (-1, i) for i, d in enumerate(docs))
        )
        t = torch.from_numpy
        fields = Fields(t(position), t(document), t(modality), {k: t(v) for k, v in extra.items()})
        longest = max((d.length for d in docs), default=0)
        grids = {k: t(np.ascontiguousarray(np.concatenate(v))) for k, v in cells.items()}
        return Layout(fields, t(starts), t(slot), t(fresh), longest, aligned, grids)

    @staticmethod
    def plain(B: int, T: int) -> Layout:
        """B rows of one document of T tokens each, without state."""
        return Layout.from_rows([[Doc(T)] for _ in range(B)], T)


def first_places(document_BT: Tensor, n: int) -> Tensor:
    """`(n + 1,)` int32 ascending first flat position of each document.

    One without positions begins where the next one does; what follows the last holds B * T.
    """
    flat = document_BT.reshape(-1).long()
    end = flat.numel()
    starts = torch.full((n + 2,), end, dtype=torch.long, device=flat.device)
    index = torch.where(flat > 0, flat - 1, n + 1)
    starts = starts.scatter_reduce(0, index, torch.arange(end, device=flat.device), "amin")
    starts[n:] = end
    return starts.flip(0).cummin(0).values.flip(0)[: n + 1].to(torch.int32)
