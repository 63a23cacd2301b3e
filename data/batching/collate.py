"""Segments to ids: here alone local codes become vocabulary ids, and rows a `Batch`.

The token stream of a document is, for each segment in order, ``begin, codes + first, end``. A null
condition is the single id ``NULL``. Token t predicts stream[t + 1]; only the codes and the ``end``
of a target segment cost loss. A masked code of a condition is the id ``MASK`` and predicts itself.
The conditions that a document begins with are its prefix, which `mask: prefix` reads both ways.

B rows, T tokens, M documents, L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from mm.batch import Batch, Values
from mm.layout import Doc, Grid, Layout
from mm.specs import Segment, TokenSpec
from mm.vocabulary import MASK, NULL, Range, Vocabulary

NO_ID = np.int32(-1)


class Features(NamedTuple):
    """Values of consecutive places of one document, whose ids are -1."""

    modality: str
    start: int  # first place in the document
    data: np.ndarray  # (L, C)
    grid: tuple[int, ...] = ()  # they are its cells, in raster order

    def part(self, start: int, stop: int) -> Features:
        """Those of the document's places ``start`` to ``stop``; a cut grid is none."""
        first, last = max(start, self.start), min(stop, self.start + len(self.data))
        if (first, last) == (self.start, self.start + len(self.data)):
            return self._replace(start=self.start - start)
        data = self.data[first - self.start : max(first, last) - self.start]
        return Features(self.modality, first - start, data)


class DocumentTokens(NamedTuple):
    """The stream of one document, L tokens long."""

    ids: np.ndarray  # (L,) int32
    targets: np.ndarray  # (L,) int32: what each token predicts; -1 = nothing (the last one)
    weights: np.ndarray  # (L,) float32: weight of that prediction
    modality: np.ndarray  # (L,) int32: range index of the input token; 0 = control token
    prefix: np.ndarray  # (L,) int32: 1 = of the leading conditions, 0 = not

    features: tuple[Features, ...] = ()

    def part(self, start: int, stop: int) -> DocumentTokens:
        """Tokens ``start`` to ``stop`` alone; the last still predicts what comes after it."""
        inside = (f.part(start, stop) for f in self.features)
        return self._make(
            (*(each[start:stop] for each in self[:-1]), tuple(f for f in inside if len(f.data)))
        )

    @property
    def target_modality(self) -> np.ndarray:
        """Range index of each target, (L,) int32; 0 = none. Of a whole document."""
        return np.append(self.modality[1:], np.int32(0))[: len(self.modality)].astype(np.int32)


class Piece(NamedTuple):
    """Consecutive tokens of one document in one row."""

    tokens: DocumentTokens
    target_modality: np.ndarray  # (L,) int32
    start: int = 0  # position in its document
    slot: int = -1  # State slot that it reads and writes; -1 = neither
    fresh: bool = True  # it begins its document


@lru_cache(maxsize=32)
def ranges(vocabulary: Vocabulary) -> Mapping[str, Range]:
    """Every modality's `Range`, computed once a vocabulary."""
    return {modality: vocabulary.range(modality) for modality in vocabulary.modalities}


@lru_cache(maxsize=32)
def grid_modalities(vocabulary: Vocabulary) -> Sequence[tuple[Range, TokenSpec]]:
    """The modalities whose codes lie on a grid of at least rows and columns."""
    specs = [s for s in vocabulary.ranges if s.grid and len(s.grid) > 1 and not s.continuous]
    return [(vocabulary.range(spec.modality), spec) for spec in specs]


def axes_of(vocabulary: Vocabulary) -> int:
    """Axes of positions in every batch of a vocabulary: time, and those of its largest grid."""
    grids = (len(spec.grid) for spec in vocabulary.ranges if spec.grid and len(spec.grid) > 1)
    return 1 + max(grids, default=0)


def grids_of(ids: np.ndarray, vocabulary: Vocabulary) -> list[Grid]:
    """The grids of a token stream (L,), each after the ``begin`` of its modality.

    A grid that breaks off is told by its length.
    """
    found = []
    for r, spec in grid_modalities(vocabulary):
        assert spec.grid is not None
        for begin in np.flatnonzero(ids == r.begin):
            grid = Grid(int(begin) + 1, spec.grid, spec.n_codebooks)
            codes = ids[grid.start : grid.start + grid.codes]
            outside = (codes < r.first) | (codes >= r.stop)
            other = np.flatnonzero(outside & (codes != MASK))
            n = int(other[0]) if len(other) else len(codes)
            found.append(grid._replace(length=n))
    return found


def document_length(segments: Sequence[Segment]) -> int:
    """Tokens of a document: two more than the codes of each segment, one for a null condition."""
    return sum(1 if s.ids is None else len(s.ids) + 2 for s in segments)


def document_tokens(segments: Sequence[Segment], vocabulary: Vocabulary) -> DocumentTokens:
    """Write one document's segments as ids of ``vocabulary``.

    Args:
        segments: in order; ``ids`` are local codes in [0, spec.n_ids). A condition without ids is
            the null condition. ``targets`` (codes, -1 = none) may replace what is predicted at each
            code; one entry more, -1, says that the segment was cut there, so that its ``end`` is no
            target. ``fields["masked"]`` (codes, bool) of a condition says which codes are hidden.
        vocabulary: gives every modality its range.
    Raises:
        UserError: the vocabulary lacks a modality.
        ValueError: a code lies outside its range (it would be read as another modality), a target
            has no ids, values are a target or have other places than ids, or a segment uses parts,
            own positions or other fields, which a token stream cannot carry.
    """
    table = ranges(vocabulary)
    n = document_length(segments)
    stream, goal = np.empty(n, np.int32), np.empty(n, np.int32)
    weight, modality = np.zeros(n, np.float32), np.zeros(n, np.int32)
    prefix, hidden = np.zeros(n, np.int32), []
    features: list[Features] = []
    at, leading = 0, True
    for s in segments:
        other = s.fields.keys() - ({"masked"} if s.role == "condition" else set())
        if s.part or s.room or s.position is not None or other:
            raise ValueError(
                f"segment '{s.modality}': room, part, position and fields are no plain tokens"
            )
        if s.ids is None:
            if s.role != "condition":
                raise ValueError(f"segment '{s.modality}': a target needs ids")
            stream[at] = goal[at] = NULL
            prefix[at] = leading
            at += 1
            continue
        r = table.get(s.modality) or vocabulary.range(s.modality)
        codes = np.asarray(s.ids)
        stop = at + len(codes) + 2
        if s.values is not None:
            features.append(_features(s, at + 1))
            stream[at + 1 : stop - 1] = -1
        elif len(codes):
            if codes.min() < 0 or codes.max() >= r.stop - r.first:
                raise ValueError(
                    f"segment '{s.modality}': code {int(codes.min())}..{int(codes.max())} outside "
                    f"0..{r.stop - r.first - 1}"
                )
            stream[at + 1 : stop - 1] = codes
            stream[at + 1 : stop - 1] += r.first
        stream[at], stream[stop - 1] = r.begin, r.end
        goal[at:stop] = stream[at:stop]
        modality[at:stop] = r.index
        leading = leading and s.role == "condition"
        prefix[at:stop] = leading
        if s.role == "target":
            weight[at + 1 : stop] = s.weight
        if "masked" in s.fields:
            hidden.append((at + 1 + np.flatnonzero(s.fields["masked"]), s.weight))
        if s.targets is not None:
            other = np.asarray(s.targets)
            own = other[: len(codes)]
            goal[at + 1 : stop - 1] = np.where(own < 0, -1, own + r.first)
            weight[at + 1 : stop - 1] *= own >= 0
            if (
                len(other) > len(codes) and other[-1] < 0
            ):  # cut short: `end` stands here, but not because the item ends
                weight[stop - 1] = 0.0
        at = stop
    targets, weights = np.empty(n, np.int32), np.empty(n, np.float32)
    if n:
        targets[:-1], targets[-1] = goal[1:], -1
        weights[:-1], weights[-1] = weight[1:], 0.0
    for index, share in hidden:
        targets[index], weights[index], stream[index] = stream[index], share, MASK
    return DocumentTokens(stream, targets, weights, modality, prefix, tuple(features))


def _features(s: Segment, start: int) -> Features:
    """The values of a segment whose first one stands at ``start``. Raises ValueError."""
    if s.role == "target":
        raise ValueError(
            f"segment '{s.modality}': values can be read, not predicted: give it the role "
            "'condition', as in the task 'image>text'"
        )
    if np.ndim(s.values) != 2 or len(s.values) != len(s.ids):
        raise ValueError(
            f"segment '{s.modality}': values {np.shape(s.values)} at {len(s.ids)} places"
        )
    if s.grid and int(np.prod(s.grid)) != len(s.values):
        raise ValueError(f"segment '{s.modality}': grid {s.grid} has not {len(s.values)} cells")
    return Features(s.modality, start, s.values, tuple(s.grid))


def of_array(spec: TokenSpec, array: np.ndarray) -> Segment:
    """The segment of what a token shard holds of an item: codes (L,), or values (..., C)."""
    if not spec.continuous:
        return Segment(spec.modality, array)
    values = array.reshape(-1, array.shape[-1])
    grid = array.shape[:-1] if array.ndim > 2 else ()
    ids = np.broadcast_to(NO_ID, len(values))
    return Segment(spec.modality, ids, values, role="condition", grid=grid)


def to_batch(
    rows: Sequence[Sequence[Sequence[Segment]]],
    vocabulary: Vocabulary,
    seq_len: int | None = None,
    max_documents: int | None = None,
    keys: Sequence[str] = (),
) -> Batch:
    """Lay rows of documents of segments out as one micro-batch on the host.

    Args:
        rows: ``rows[b][m]`` is the list of segments of the m-th document of row b.
        vocabulary: id space of the model.
        seq_len: T; default the longest row.
        max_documents: static M of the whole batch; default the number of documents.
        keys: sample keys, for error messages and quarantine.
    Returns:
        ``ids`` and ``targets`` (B, T, 1) int32, ``weight`` (B, T) float32, ``places["tokens"]``
        (P,) int32, ``labels["target_modality"]`` (B, T) int32: the range index of the target, 0 =
        none. ``values[modality]``: the items of continuous modalities, at places without ids. Codes
        and values of a grid have rows and columns on position axes 1, 2, .. and stand in
        ``layout.grids``. ``layout.fields.extra["prefix"]`` marks leading conditions.
    Raises:
        ValueError: a row does not fit ``seq_len``, or more documents than ``max_documents``.
    """
    pieces = []
    for row in rows:
        tokens = [document_tokens(segments, vocabulary) for segments in row]
        pieces.append([Piece(d, d.target_modality) for d in tokens])
    return pieces_to_batch(pieces, vocabulary, seq_len, max_documents, keys)


def pieces_to_batch(
    rows: Sequence[Sequence[Piece]],
    vocabulary: Vocabulary,
    seq_len: int | None = None,
    max_documents: int | None = None,
    keys: Sequence[str] = (),
) -> Batch:
    """Lay rows of pieces of documents out; the rest as of `to_batch`."""
    layout = Layout.from_rows(
        [
            [
                Doc(
                    len(p.tokens.ids),
                    modality=p.tokens.modality,
                    extra={"prefix": p.tokens.prefix},
                    slot=p.slot,
                    fresh=p.fresh,
                    start=p.start,
                    grids=[
                        *grids_of(p.tokens.ids, vocabulary),
                        *(Grid(f.start, f.grid) for f in p.tokens.features if f.grid),
                    ],
                )
                for p in row
            ]
            for row in rows
        ],
        seq_len,
        max_documents,
        axes_of(vocabulary),
    )
    B, T = layout.shape
    ids, targets = np.full((B, T), -1, np.int32), np.full((B, T), -1, np.int32)
    weight, goal = np.zeros((B, T), np.float32), np.zeros((B, T), np.int32)
    features: dict[str, list[tuple[int, Features]]] = {}
    for b, row in enumerate(rows):
        at = 0
        for d, of_target, *_ in row:
            here = slice(at, at + len(d.ids))
            ids[b, here], targets[b, here] = d.ids, d.targets
            weight[b, here], goal[b, here] = d.weights, of_target
            for f in d.features:
                features.setdefault(f.modality, []).append((b * T + at + f.start, f))
            at = here.stop
    places = np.flatnonzero(weight > 0).astype(np.int32)
    return Batch(
        layout,
        torch.from_numpy(ids)[..., None],
        torch.from_numpy(targets)[..., None],
        torch.from_numpy(weight),
        places={"tokens": torch.from_numpy(places)},
        values={modality: values_of(items) for modality, items in features.items()},
        labels={"target_modality": torch.from_numpy(goal)},
        keys=tuple(keys),
    )


def values_of(items: Sequence[tuple[int, Features]]) -> Values:
    """Items of one modality, each with its first flat place; values are padded at the end."""
    data = [f.data for _, f in items]
    lengths = torch.tensor([len(each) for each in data], dtype=torch.int32)
    padded = np.zeros((len(items), int(lengths.max()), data[0].shape[1]), data[0].dtype)
    for row, each in zip(padded, data, strict=True):
        row[: len(each)] = each
    first = torch.tensor([place for place, _ in items], dtype=torch.int32)
    grids = [(f.grid[0], f.grid[1]) if len(f.grid) == 2 else (1, len(f.data)) for _, f in items]
    return Values(torch.from_numpy(padded), lengths, first, lengths, tuple(grids), is_full=True)
