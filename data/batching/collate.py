"""Rows of documents to a `Batch`. B rows, T tokens, M documents, L tokens of one document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from mm.batch import Batch, Values
from mm.data.batching.codebooks import CODES
from mm.data.batching.document import DEFAULT, DocumentTokens, Features, document_tokens, highest
from mm.data.batching.plain_batch import plain_batch
from mm.errors import UserError
from mm.layout import Doc, Grid, Layout, places_of
from mm.specs import Segment, TokenSpec
from mm.vocabulary import MASK, Range, Vocabulary

TOKENS = "tokens"  # the head that predicts ids


class Piece(NamedTuple):
    """Consecutive tokens of one document in one row."""

    tokens: DocumentTokens
    target_modality: np.ndarray  # (L,) int32
    start: int = 0  # position in its document
    slot: int = -1  # State slot that it reads and writes; -1 = neither
    fresh: bool = True  # it begins its document


class Declared(NamedTuple):
    """What every batch of a stream has, whatever its rows hold: so that all ranks run alike."""

    parts: tuple[str, ...] = ()  # second sequences
    fields: tuple[str, ...] = ()  # named fields of the layout
    values: tuple[str, ...] = ()  # modalities whose values are predicted
    labels: tuple[str, ...] = ()  # modalities that label documents
    codebooks: tuple[str, ...] = ()  # modalities with a code of every codebook in one place


@lru_cache(maxsize=32)
def grid_modalities(vocabulary: Vocabulary) -> Sequence[tuple[Range, TokenSpec]]:
    """The modalities whose codes lie on a grid of at least rows and columns."""
    specs = [s for s in vocabulary.ranges if s.grid and len(s.grid) > 1 and not s.continuous]
    return [(vocabulary.range(spec.modality), spec) for spec in specs]


def axes_of(vocabulary: Vocabulary) -> int:
    """Axes of positions in every batch of a vocabulary: time, and those of its largest grid."""
    grids = (len(spec.grid) for spec in vocabulary.ranges if spec.grid and len(spec.grid) > 1)
    return 1 + max(grids, default=0)


def grids_of(ids: np.ndarray, vocabulary: Vocabulary, streams: bool = False) -> list[Grid]:
    """The grids of a token stream (L,), each after the ``begin`` of its modality.

    A grid that breaks off is told by its length. ``streams``: other codebooks may stand in further
    streams, and a cell then takes one place.
    """
    found = []
    for r, spec in grid_modalities(vocabulary):
        assert spec.grid is not None
        for begin in (ids == r.begin).nonzero()[0]:
            start, books = int(begin) + 1, spec.n_codebooks
            codes = ids[start : start + math.prod(spec.grid) * books]
            n = len(codes)
            if n and highest(codes - r.first) >= r.stop - r.first:  # most grids are whole
                outside = (codes < r.first) | (codes >= r.stop)
                other = np.flatnonzero(outside & (codes != MASK))
                n = int(other[0]) if len(other) else n
            if streams and (codes[:n] < r.first + spec.vocab_size).all():
                books = 1
            found.append(Grid(start, spec.grid, books, n))
    return found


def to_batch(
    rows: Sequence[Sequence[Sequence[Segment]]],
    vocabulary: Vocabulary,
    seq_len: int | None = None,
    max_documents: int | None = None,
    keys: Sequence[str] = (),
    declared: Declared | None = None,
    part_len: int | None = None,
) -> Batch:
    """Lay rows of documents of segments out as one micro-batch on the host.

    Args:
        rows: ``rows[b][m]`` is the list of segments of the m-th document of row b.
        vocabulary: id space of the model.
        seq_len: T; default the longest row.
        max_documents: static M of the whole batch; default the number of documents.
        keys: sample keys, for error messages and quarantine; one a document, if any.
        declared: what the batch has besides; default what its documents have.
        part_len: T of second sequences; default the longest row of each.
    Returns:
        ``ids`` and ``targets`` (B, T, S) int32, S = 1, or the most codebooks in one place,
        ``weight`` (B, T) float32, ``places["tokens"]`` (P,) int32, of further codebooks
        ``places["codes"]``, ``labels["target_modality"]`` (B, T) int32: the range index of the
        target, 0 = none. ``values[modality]``: the items of continuous modalities, at places
        without ids. Codes and values of a grid have rows and columns on position axes 1, 2, .. and
        stand in ``layout.grids``. ``layout.fields.extra["prefix"]`` marks leading conditions.
        Values that are predicted: ``places[modality]`` (P,) and ``head_targets[modality]`` (P, C).
        Labels: the first place of each document that has one in ``places[modality]`` (P,), its ids
        in ``head_targets[modality]`` (P, L), padded with -1. Each of ``parts`` has the same
        documents.
    Raises:
        ValueError: a row does not fit ``seq_len``, or more documents than ``max_documents``.
        UserError: segments that cannot be written, with ``keys``: names the sample.
    """
    if declared is None or not any(declared):
        found = plain_batch(
            rows,
            vocabulary,
            seq_len,
            max_documents,
            keys,
            TOKENS,
            grid_modalities(vocabulary),
            axes_of(vocabulary),
        )
        if found is not None:
            return found
    named = iter(keys)
    pieces = [[_piece(segments, vocabulary, next(named, None)) for segments in row] for row in rows]
    return pieces_to_batch(
        pieces, vocabulary, seq_len, max_documents, keys, declared, part_len=part_len
    )


def _piece(segments: Sequence[Segment], vocabulary: Vocabulary, key: str | None) -> Piece:
    tokens = document_of(segments, vocabulary, key)
    return Piece(tokens, tokens.target_modality)


def document_of(
    segments: Sequence[Segment], vocabulary: Vocabulary, key: str | None
) -> DocumentTokens:
    """`document_tokens` of sample ``key``, which a UserError names; None: as it raises."""
    try:
        return document_tokens(segments, vocabulary)
    except ValueError as error:
        if key is None:
            raise
        raise UserError(f"sample '{key}': {error}") from error


def pieces_to_batch(
    rows: Sequence[Sequence[Piece]],
    vocabulary: Vocabulary,
    seq_len: int | None = None,
    max_documents: int | None = None,
    keys: Sequence[str] = (),
    declared: Declared | None = None,
    part_len: int | None = None,
) -> Batch:
    """Lay rows of pieces of documents out; the rest as of `to_batch`."""
    axes = axes_of(vocabulary)
    known = _declared(rows, vocabulary, declared)
    docs = [[_doc(p, vocabulary, axes, known.fields) for p in row] for row in rows]
    layout = Layout.from_rows(docs, seq_len, max_documents, axes)
    B, T = layout.shape
    S = max((vocabulary.spec(m).n_codebooks for m in known.codebooks), default=1)
    ids, targets = np.full((B, T, S), -1, np.int32), np.full((B, T, S), -1, np.int32)
    weight, goal = np.zeros((B, T), np.float32), np.zeros((B, T), np.int32)
    features: dict[str, list[tuple[int, Features]]] = {}
    goals: dict[str, list[tuple[int, np.ndarray]]] = {m: [] for m in known.values}
    labels: dict[str, list[tuple[int, np.ndarray]]] = {m: [] for m in known.labels}
    for b, row in enumerate(rows):
        at = 0
        ids_T, targets_T, weight_T, goal_T = ids[b, :, 0], targets[b, :, 0], weight[b], goal[b]
        for d, of_target, *_ in row:
            here = slice(at, at + len(d.ids))
            ids_T[here], targets_T[here] = d.ids, d.targets
            if d.codes is not None and d.code_targets is not None:
                ids[b, here, 1 : 1 + d.codes.shape[1]] = d.codes
                targets[b, here, 1 : 1 + d.codes.shape[1]] = d.code_targets
            weight_T[here], goal_T[here] = d.weights, of_target
            for f in d.features:
                features.setdefault(f.modality, []).append((b * T + at + f.start, f))
            for f in d.goals:
                kept = np.flatnonzero(d.weights[f.start : f.start + len(f.data)] > 0)
                goals[f.modality] += [(b * T + at + f.start + i, f.data[i]) for i in kept.tolist()]
            for m, label in d.labels.items():
                labels[m].append((b * T + at, label))
            at = here.stop
    predicted = weight > 0
    of_codes = predicted & (targets[..., 1:] >= 0).any(-1)
    if known.values or S > 1:  # a place that predicts values, or other codes, predicts no id
        predicted &= targets[..., 0] >= 0
    places = {TOKENS: torch.from_numpy(np.flatnonzero(predicted).astype(np.int32))}
    if S > 1:
        places[CODES] = torch.from_numpy(np.flatnonzero(of_codes).astype(np.int32))
    head_targets = {}
    for m, found in goals.items():
        C = vocabulary.spec(m).n_features
        places[m] = torch.tensor([place for place, _ in found], dtype=torch.int32)
        stacked = np.stack([v for _, v in found]) if found else np.zeros((0, C), np.float32)
        head_targets[m] = torch.from_numpy(stacked)
    for m, found in labels.items():
        places[m] = torch.tensor([place for place, _ in found], dtype=torch.int32)
        head_targets[m] = torch.from_numpy(_padded([ids for _, ids in found], -1))
    return Batch(
        layout,
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        torch.from_numpy(weight),
        places=places,
        values={modality: values_of(items) for modality, items in features.items()},
        labels={"target_modality": torch.from_numpy(goal)},
        parts={
            name: _part(name, rows, vocabulary, max_documents, known, part_len)
            for name in known.parts
        },
        keys=tuple(keys),
        head_targets=head_targets,
    )


EMPTY = document_tokens([], Vocabulary())


def _part(
    name: str,
    rows: Sequence[Sequence[Piece]],
    vocabulary: Vocabulary,
    max_documents: int | None,
    known: Declared,
    part_len: int | None,
) -> Batch:
    """A second sequence: document m of it goes with document m of the main one, or is empty."""
    own = [[p.tokens.parts.get(name, EMPTY) for p in row] for row in rows]
    longest = max((sum(len(d.ids) for d in row) for row in own), default=0)
    size = part_len or max(1, longest)
    if longest > size:
        raise UserError(
            f"part '{name}': a row of {longest} tokens does not fit data.part_len {size}: raise it"
        )
    pieces = [[Piece(d, d.target_modality) for d in row] for row in own]
    declared = Declared(fields=known.fields, codebooks=known.codebooks)
    return pieces_to_batch(pieces, vocabulary, size, max_documents, declared=declared)


def _in_places(d: DocumentTokens, vocabulary: Vocabulary) -> set[str]:
    """Modalities of a document that have several codebooks in one place."""
    if d.codes is None:
        return set()
    numbers = np.unique(d.modality[(d.codes >= 0).any(1)]).tolist()
    return {vocabulary.modalities[number - 1] for number in numbers}


def _declared(
    rows: Sequence[Sequence[Piece]], vocabulary: Vocabulary, declared: Declared | None
) -> Declared:
    """What the batch has. Raises UserError where a document has what is not declared."""
    docs = [p.tokens for row in rows for p in row]
    if not any(d.goals or d.labels or d.fields or d.parts or d.codes is not None for d in docs):
        return declared or Declared()
    sequences = [s for d in docs for s in (d, *d.parts.values())]
    found = Declared(
        tuple(sorted({name for d in docs for name in d.parts})),
        tuple(sorted({name for d in sequences for name in d.fields})),
        tuple(sorted({f.modality for d in docs for f in d.goals})),
        tuple(sorted({m for d in docs for m in d.labels})),
        tuple(sorted({m for d in sequences for m in _in_places(d, vocabulary)})),
    )
    if declared is None:
        declared = found
    for kind, given, have in zip(Declared._fields, declared, found, strict=True):
        missing = set(have) - set(given)
        if missing:
            raise UserError(
                f"data.transform: one makes {kind} '{min(missing)}' and does not say so: set "
                f"`makes_{kind}` of its class"
            )
    taken = TOKENS in (*declared.values, *declared.labels)
    if taken or set(declared.values) & set(declared.labels):
        raise ValueError("a head predicts one thing: ids ('tokens'), values or labels")
    return declared


def _doc(p: Piece, vocabulary: Vocabulary, axes: int, fields: Iterable[str]) -> Doc:
    d = p.tokens
    extra: dict[str, Any] = {name: np.int32(0) for name in fields}
    doc = Doc(
        len(d.ids),
        modality=d.modality,
        extra={**extra, **d.fields, "prefix": d.prefix},
        slot=p.slot,
        fresh=p.fresh,
        start=p.start,
        grids=[
            *grids_of(d.ids, vocabulary, d.codes is not None),
            *(Grid(f.start, f.grid) for f in d.features if f.grid and not f.room),
        ],
    )
    if d.position is None:
        return doc
    if d.position.shape[1] >= axes:
        raise UserError(
            f"data.transform: one gives positions of {d.position.shape[1]} axes; the grids of the "
            f"vocabulary have {axes - 1}"
        )
    position = places_of(doc, axes).copy()
    own = position[:, 1 : 1 + d.position.shape[1]]
    np.copyto(own, d.position, where=d.position != DEFAULT)
    return doc._replace(position=position)


def _padded(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Rows of ids, (P, longest) int32."""
    out = np.full((len(rows), max(map(len, rows), default=0)), fill, np.int32)
    for row, each in zip(out, rows, strict=True):
        row[: len(each)] = each
    return out


def values_of(items: Sequence[tuple[int, Features]]) -> Values:
    """Items of one modality, each with its first flat place; values are padded at the end."""
    data = [f.data for _, f in items]
    lengths = torch.tensor([len(each) for each in data], dtype=torch.int32)
    padded = np.zeros((len(items), int(lengths.max()), data[0].shape[1]), data[0].dtype)
    for row, each in zip(padded, data, strict=True):
        row[: len(each)] = each
    first = torch.tensor([place for place, _ in items], dtype=torch.int32)
    room = torch.tensor([f.places for _, f in items], dtype=torch.int32)
    grids = [(f.grid[0], f.grid[1]) if len(f.grid) == 2 else (1, len(f.data)) for _, f in items]
    is_full = not any(f.room for _, f in items)
    return Values(torch.from_numpy(padded), lengths, first, room, tuple(grids), is_full=is_full)
