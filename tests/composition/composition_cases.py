"""Documents of a case, and the calls that feed them to a model. B rows, T tokens, G items."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from composition_configs import ITEM, Case, D
from torch import Tensor

from mm.batch import Batch, Values
from mm.layout import Doc, Grid, Layout
from mm.mask import Causal, Full, Mask, Prefix, Window
from mm.registry import ADAPTERS
from mm.vocabulary import RESERVED

MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "full": Full(),
    "prefix": Prefix(),
    "window": Window(3),
}
EXPRESSION = "causal & ~(item != 0 & q.prefix) | same_prefix"  # of named fields, given and made
TEXT = [{"length": 7}, {"length": 1}, {"length": 5}]
MARKED = [
    {"length": 7, "blocks": [[0, 3]]},
    {"length": 1},
    {"length": 6, "blocks": [[0, 5]], "grid": [1, 2, 2]},
]
ITEMS = [{"length": 6, "item": [2, 2, 4]}, {"length": 3}, {"length": 5, "item": [0, 1, 2]}]


class Piece(NamedTuple):
    """Content places ``start .. stop - 1`` of a document, for one call."""

    document: int
    start: int
    stop: int
    slot: int = -1


@dataclass(frozen=True)
class Call:
    """A batch, and where the content of each piece lies in it."""

    batch: Batch
    pieces: tuple[Piece, ...]
    at: tuple[Tensor, ...]  # flat places of each piece


@dataclass(frozen=True)
class Content:
    """What a document says, whatever room is kept for it."""

    ids: np.ndarray  # (length,), -1 where an item stands
    position: np.ndarray  # (length, A)
    block: np.ndarray  # (length,) groups that see both ways
    item: tuple[int, int, int] | None  # first place, vectors, room
    grid: tuple[int, int, int] | None  # first place, rows, columns
    features: np.ndarray  # (vectors, ...)

    def atoms(self) -> list[tuple[int, int]]:
        """Ranges that no call may cut."""
        found = [(self.item[0], self.item[0] + self.item[1])] if self.item else []
        for number in sorted({*self.block} - {0}):
            inside = np.flatnonzero(self.block == number)
            found.append((int(inside[0]), int(inside[-1]) + 1))
        return found

    def borders(self) -> list[int]:
        """Places where a call may end: after 0 .. length tokens."""
        inside = {n for a, b in self.atoms() for n in range(a + 1, b)}
        return [n for n in range(len(self.ids) + 1) if n not in inside]


@functools.cache
def item_shape(adapter: str) -> tuple[int, ...]:
    """Shape of one vector that an adapter takes."""
    return tuple(
        ADAPTERS.parse(json.loads(adapter)).build(D).zero_item(torch.device("cpu")).shape[2:]
    )


def contents(case: Case) -> list[Content]:
    """The documents of a case; the same numbers for document i however others change."""
    axes = 3 if any(d.get("grid") for d in case["documents"]) else 1
    adapter = case["model"].get("adapters", {}).get(ITEM)
    shape = item_shape(json.dumps(adapter, sort_keys=True)) if adapter else ()
    made = []
    for i, d in enumerate(case["documents"]):
        rng, n = np.random.default_rng([case["seed"], i]), d["length"]
        ids = rng.integers(RESERVED + 2, RESERVED + 5, 64)[:n]  # few, so that they recur
        grid, item = d.get("grid"), d.get("item")
        if grid and item and item[2] > item[1]:  # cells of a grid lie side by side
            first, cells = grid[0], grid[1] * grid[2]
            grid = None if first < item[0] + item[1] < first + cells else grid
        position = np.repeat(np.arange(n, dtype=np.int32)[:, None], axes, 1)
        if grid is not None:
            at, Y, X = grid
            cells = np.unravel_index(np.arange(Y * X), (Y, X))
            for axis, cell in enumerate(cells, 1):
                position[at : at + Y * X, axis] = at + cell
        block = np.zeros(n, np.int32)
        for number, (a, b) in enumerate(d.get("blocks") or [], 1):
            block[a:b] = number
        features = rng.standard_normal((item[1] if item else 0, *shape))
        if item:
            ids[item[0] : item[0] + item[1]] = -1
        made.append(
            Content(ids, position, block, tuple(item) if item else None,
                    tuple(grid) if grid else None, features)
        )  # fmt: skip
    return made


def lay(case: Case, rows: Sequence[Sequence[Piece]], *, pad: int = 0, spare: bool = True) -> Call:
    """One call's batch. ``spare``: items have the room that the case says, else what they need."""
    documents, fields = contents(case), []
    marked = any(d.get("blocks") for d in case["documents"])
    ids_rows, where, values = [], [], []
    for row in rows:
        docs, ids, at = [], [], []
        for p in row:
            c = documents[p.document]
            place, extra = np.arange(p.stop - p.start), 0
            index = np.arange(p.start, p.stop)
            if c.item is not None and p.start <= c.item[0] < p.stop:
                first, n, room = c.item
                extra = room - n if spare else 0
                after = first + n - p.start
                index = np.insert(index, after, [first + n - 1] * extra)
                place = place + np.where(place >= after, extra, 0)
                values.append((len(ids_rows), len(ids) + first - p.start, n + extra, c.features))
            grids = []
            if c.grid is not None and p.start <= c.grid[0]:
                first, last = c.grid[0] - p.start, c.grid[0] + c.grid[1] * c.grid[2] - 1
                if last < p.stop:
                    grids.append(Grid(int(place[first]), c.grid[1:]))
            named = {"prefix": c.block[index]} if marked else {}
            docs.append(
                Doc(len(index), c.position[index], extra=named, slot=p.slot, fresh=p.start == 0,
                    start=p.start, grids=grids)
            )  # fmt: skip
            at.append(len(ids) + place)
            ids += [int(v) for v in c.ids[index]]
        fields.append(docs)
        ids_rows.append(ids)
        where.append(at)
    T = max((len(ids) for ids in ids_rows), default=0) + pad
    layout = Layout.from_rows(fields, T, axes=documents[0].position.shape[1] if documents else 1)
    ids = np.full((len(rows), T), RESERVED + 2, np.int64)
    for b, row in enumerate(ids_rows):
        ids[b, : len(row)] = row
    batch = Batch.of_ids(torch.from_numpy(ids), layout)
    if values:
        number = lambda *n: torch.tensor(n, dtype=torch.int32)
        longest = max(len(v[3]) for v in values)
        data = np.full((len(values), longest, *values[0][3].shape[1:]), 1e3)
        for g, (_, _, _, features) in enumerate(values):
            data[g, : len(features)] = features
        made = Values(
            torch.from_numpy(data),
            number(*(len(v[3]) for v in values)),
            number(*(b * T + at for b, at, _, _ in values)),
            number(*(room for _, _, room, _ in values)),
        )
        batch = replace(batch, values={ITEM: made})
    flat = [torch.from_numpy(b * T + at) for b, row in enumerate(where) for at in row]
    return Call(batch, tuple(p for row in rows for p in row), tuple(flat))


def packed_rows(case: Case) -> list[list[Piece]]:
    """All documents whole, in two rows."""
    docs = [Piece(i, 0, d["length"]) for i, d in enumerate(case["documents"])]
    half = -(-len(docs) // 2)
    return [row for row in (docs[:half], docs[half:]) if row]


class Step(NamedTuple):
    """One call of a plan: rows of pieces, and after a draft how many tokens each slot accepts."""

    rows: list[list[Piece]]
    accepted: list[int] | None = None


def steps(case: Case, rng: random.Random) -> Iterator[Step]:
    """Calls that feed all documents to their ends, cut at random.

    Some have a row for each document, and some are drafts of which a part is accepted (drafts come
    after what no call may cut).
    """
    documents = contents(case)
    done, n = [0] * len(documents), len(documents)
    whole = [max((b for _, b in c.atoms()), default=0) for c in documents]
    while any(at < len(c.ids) for at, c in zip(done, documents, strict=True)):
        aligned, draft = rng.random() < 0.4, rng.random() < 0.25
        row: list[Piece] = []
        for i, c in enumerate(documents):
            ends = [at for at in c.borders() if at > done[i]]
            takes = ends and rng.random() < 0.7 and not (draft and done[i] < whole[i])
            stop = rng.choice(ends[:3]) if takes else done[i]
            if aligned or stop > done[i]:
                row.append(Piece(i, done[i], stop, i))
        if not any(p.stop > p.start for p in row):
            continue
        accepted = [0] * n
        for p in row:
            size = p.stop - p.start
            accepted[p.slot] = rng.randint(0, size) if draft else size
            done[p.document] += accepted[p.slot]
        if aligned:
            rows = [[p] for p in row]
        else:
            rng.shuffle(row)
            cut = rng.randint(0, len(row))
            rows = [part for part in (row[:cut], row[cut:]) if part]
        yield Step(rows, accepted if draft else None)
