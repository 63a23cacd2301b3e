"""Rows of documents of codes alone, laid out in one go: what `pieces_to_batch` gives, bit by bit.

B rows, T tokens, M documents, N segments, C codes, P tokens of all documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mm.batch import Batch
from mm.data.batching.document import ranges
from mm.layout import Fields, Grid, Layout, cells_of
from mm.specs import Segment, TokenSpec
from mm.vocabulary import NULL, Range, Vocabulary

CODES = np.dtype(np.int32)
GridModalities = Sequence[tuple[Range, TokenSpec]]


class Table(NamedTuple):
    """Segments of a micro-batch, one an entry of every list but ``codes`` and ``gridded``."""

    codes: list[np.ndarray]
    places: list[int]  # tokens, with begin and end
    index: list[int]  # of the range; 0 = a null condition
    begin: list[int]  # id that it begins with
    end: list[int]  # id that it ends with
    first: list[int]  # id of code 0
    n_ids: list[int]
    leading: list[int]  # 1: of the document's leading conditions
    weight: list[float]  # of its codes and its end; 0 of a condition
    documents: list[int]  # segments of each document
    gridded: list[tuple[int, TokenSpec, int]]  # segment, spec and codes of those on a grid


def table_of(
    rows: Sequence[Sequence[Sequence[Segment]]], vocabulary: Vocabulary, grids: GridModalities
) -> Table | None:
    """The segments of rows; None where one is more than codes, or no part of the vocabulary."""
    known, on_grid = ranges(vocabulary), {r.index: k for k, (r, _) in enumerate(grids)}
    t = Table([], [], [], [], [], [], [], [], [], [], [])
    codes, places, index, begin, end, first, n_ids, leads, weights, documents, gridded = t
    for row in rows:
        for document in row:
            leading, of_document = 1, []
            for s in document:
                m, ids, values, room, position, role, weight, targets, fields, part, _, inline = s
                if not (values is targets is position is None) or room or fields or part or inline:
                    return None
                if role == "condition":
                    weight = 0.0
                elif role == "target" and ids is not None:
                    leading = 0
                else:
                    return None
                leads.append(leading)
                weights.append(weight)
                if ids is None:
                    for lists, value in ((places, 1), (begin, NULL), (end, NULL)):
                        lists.append(value)
                    for lists in (index, first, n_ids):
                        lists.append(0)
                    continue
                found = known.get(m)
                if type(ids) is not np.ndarray or ids.dtype != CODES or ids.ndim != 1:
                    return None
                if found is None or found[1].continuous:
                    return None
                r, n = found[0], len(ids)
                if r.index in on_grid:
                    of_document.append((on_grid[r.index], len(places), found[1], n))
                codes.append(ids)
                places.append(n + 2)
                index.append(r.index)
                begin.append(r.begin)
                end.append(r.end)
                first.append(r.first)
                n_ids.append(r.stop - r.first)
            documents.append(len(document))
            # As `grids_of` finds them: modality by modality.
            gridded += [each[1:] for each in sorted(of_document, key=lambda each: each[:2])]
    return t


def plain_batch(
    rows: Sequence[Sequence[Sequence[Segment]]],
    vocabulary: Vocabulary,
    seq_len: int | None,
    max_documents: int | None,
    keys: Sequence[str],
    head: str,
    grids: GridModalities,
    axes: int,
) -> Batch | None:
    """The micro-batch of `to_batch`; None where it has more than codes, or something is wrong.

    Args:
        head: that predicts ids.
        grids: the modalities of grids.
        axes: of positions.
    """
    t = table_of(rows, vocabulary, grids)
    if t is None or not t.codes or not all(t.documents):
        return None
    of_codes = np.array(t.index) > 0  # (N,)
    places, first = np.array(t.places), np.array(t.first, np.int32)
    n_codes = np.where(of_codes, places - 2, 0)
    bounds = np.cumsum([0, *t.documents])  # of the segments of each document
    begun = np.concatenate([[0], np.cumsum(places)])  # token of all documents; (N + 1,)
    starts, lengths = begun[bounds[:-1]], np.diff(begun[bounds])  # of documents; (M,)
    of_row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    used = np.bincount(of_row, lengths, len(rows)).astype(np.int64)
    B, T = len(rows), int(used.max()) if seq_len is None else seq_len
    M = len(lengths) if max_documents is None else max_documents
    if used.max() > T or len(lengths) > M:
        return None
    shift = np.arange(B) * T - np.concatenate([[0], np.cumsum(used)[:-1]])  # of tokens to places
    codes = np.concatenate(t.codes)
    each = n_codes[of_codes]
    if (codes.view(np.uint32) >= np.repeat(np.array(t.n_ids, np.uint32)[of_codes], each)).any():
        return None
    # All tokens of all documents, (P,), then the places where they stand.
    tokens = np.empty(begun[-1], np.int32)
    inside = np.ones(begun[-1], bool)
    inside[begun[:-1]], inside[begun[1:] - 1] = False, False
    tokens[begun[1:] - 1], tokens[begun[:-1]] = t.end, t.begin
    tokens[inside] = codes + np.repeat(first[of_codes], each)
    index = np.repeat(np.array(t.index, np.int32), places)
    weight = np.repeat(np.array(t.weight, np.float32), places)
    weight[begun[1:] - 1] = 0  # of what the last place of a segment predicts
    time = np.arange(begun[-1], dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
    following = lambda values, last: _following(values, starts + lengths - 1, last)
    at = np.arange(begun[-1]) + np.repeat(shift, used)
    lay = lambda values, empty: _lay(values, at, B, T, empty)
    numbers = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    position = np.zeros((B * T, axes), np.int32)
    position[at] = time[:, None]
    whole = _grids(t.gridded, begun, at, time, position)
    cu_seqlens = np.full(M + 1, B * T, np.int32)
    cu_seqlens[: len(lengths)] = at[starts]
    ids, weights = lay(tokens, -1), lay(weight, 0)
    wrap = torch.from_numpy
    fields = Fields(
        wrap(position.reshape(B, T, axes)),
        wrap(lay(numbers, 0)),
        wrap(lay(index, 0)),
        {"prefix": wrap(lay(np.repeat(np.array(t.leading, np.int32), places), 0))},
    )
    layout = Layout(
        fields,
        wrap(cu_seqlens),
        torch.full((M,), -1, dtype=torch.int32),
        torch.ones(M, dtype=torch.bool),
        int(lengths.max()),
        all(len(row) == 1 for row in rows),
        {shape: wrap(found) for shape, found in whole.items()},
    )
    return Batch(
        layout,
        wrap(ids.reshape(B, T, 1)),
        wrap(lay(following(tokens, -1), -1).reshape(B, T, 1)),
        wrap(weights),
        places={head: wrap(np.flatnonzero(weights > 0).astype(np.int32))},
        labels={"target_modality": wrap(lay(following(index, 0), 0))},
        keys=tuple(keys),
    )


def _following(values: np.ndarray, ends: np.ndarray, last: int) -> np.ndarray:
    """What stands behind each token of a document; ``last`` behind its last one."""
    out = np.empty_like(values)
    out[:-1] = values[1:]
    out[ends] = last
    return out


def _lay(values: np.ndarray, at: np.ndarray, B: int, T: int, empty: int) -> np.ndarray:
    """Values of tokens at their places, `(B, T)`."""
    out = np.full(B * T, empty, values.dtype)
    out[at] = values
    return out.reshape(B, T)


def _grids(
    gridded: Sequence[tuple[int, TokenSpec, int]],
    begun: np.ndarray,
    at: np.ndarray,
    time: np.ndarray,
    position: np.ndarray,
) -> dict[tuple[int, ...], np.ndarray]:
    """Write the positions of the cells of grids; the places of whole ones by shape."""
    whole: dict[tuple[int, ...], list[np.ndarray]] = {}
    axes = position.shape[1] - 1
    by_kind: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
    order: dict[tuple[int, ...], list[tuple[tuple[tuple[int, ...], int, int], int]]] = {}
    for segment, spec, n in gridded:
        assert spec.grid is not None
        kind = spec.grid, spec.n_codebooks, min(n, Grid(0, spec.grid, spec.n_codebooks).codes)
        same = by_kind.setdefault(kind, [])
        if kind[2] == Grid(0, spec.grid, spec.n_codebooks).codes:
            order.setdefault(spec.grid, []).append((kind, len(same)))
        same.append(segment)
    found = {}
    for kind, segments in by_kind.items():
        shape, books, n = kind
        tokens = begun[segments] + 1
        places = found[kind] = at[tokens][:, None] + np.arange(n)  # (grids, n)
        cells = cells_of(shape, books)[:n, :axes]
        position[places, 1 : 1 + cells.shape[1]] = cells + time[tokens][:, None, None]
    for shape, ordered in order.items():
        for kind, i in ordered:
            whole.setdefault(shape, []).append(found[kind][i].reshape(-1, kind[1]).T)
    return {k: np.ascontiguousarray(np.concatenate(v), np.int32) for k, v in whole.items()}
