"""Segments to ids: here alone local codes become vocabulary ids.

The token stream of a document is, for each segment in order, ``begin, codes + first, end``; values
that are inline stand inside a span of ids, see `borders.py`. A null condition is the single id
``NULL``. Token t predicts stream[t + 1]; only the codes and the ``end``
of a target segment cost loss. A masked code of a condition is the id ``MASK`` and predicts itself.
The conditions that a document begins with are its prefix, which `mask: prefix` reads both ways.
Values stand at places whose id is -1; those of a target are predicted by the place before each.
Where places hold a code of every codebook, `end` fills the first one from where that is over to
where all are; predicted is the first of them.

L tokens of one document, C features, A axes of positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mm.data.batching.borders import borders, lengths_within
from mm.data.batching.codebooks import check_places
from mm.specs import NONE, Segment, TokenSpec
from mm.vocabulary import MASK, NULL, Range, Vocabulary

NO_ID = np.int32(-1)
DEFAULT = np.iinfo(np.int32).min  # a position that is as the layout makes it
RESERVED_FIELDS = {"prefix"}  # made here


class Features(NamedTuple):
    """Values of consecutive places of one document."""

    modality: str
    start: int  # first place in the document
    data: np.ndarray  # (L, C)
    grid: tuple[int, ...] = ()  # they are its cells, in raster order
    room: int = 0  # places that are kept for them; 0 = one for each

    @property
    def places(self) -> int:
        """Places of the document that are theirs."""
        return self.room or len(self.data)

    def part(self, start: int, stop: int) -> Features | None:
        """Those of the document's places ``start`` to ``stop``; a cut grid is none.

        Raises ValueError where a border cuts values that have not a place each.
        """
        first, last = max(start, self.start), min(stop, self.start + self.places)
        if first >= last:
            return None
        if (first, last) == (self.start, self.start + self.places):
            return self._replace(start=self.start - start)
        if self.room:
            raise ValueError(
                f"segment '{self.modality}': {len(self.data)} values fill {self.room} places "
                "together, which a window cuts"
            )
        data = self.data[first - self.start : last - self.start]
        return Features(self.modality, first - start, data)


class DocumentTokens(NamedTuple):
    """The stream of one document, L tokens long."""

    ids: np.ndarray  # (L,) int32
    targets: np.ndarray  # (L,) int32: what each token predicts; -1 = nothing (the last one)
    weights: np.ndarray  # (L,) float32: weight of that prediction
    modality: np.ndarray  # (L,) int32: range index of the input token; 0 = control token
    prefix: np.ndarray  # (L,) int32: 1 = of the leading conditions, 0 = not
    features: tuple[Features, ...] = ()
    goals: tuple[Features, ...] = ()  # values that the places from `start` on predict
    position: np.ndarray | None = None  # (L, A - 1) int32 of axes 1, 2, ..; `DEFAULT` = not given
    fields: Mapping[str, np.ndarray] = NONE  # name -> (L,) int32
    labels: Mapping[str, np.ndarray] = NONE  # modality -> ids of the vocabulary, of no place
    parts: Mapping[str, DocumentTokens] = NONE  # second sequences
    # (L, C - 1) int32: ids of the further codebooks of each place, -1 = none; None: one id a place
    codes: np.ndarray | None = None
    code_targets: np.ndarray | None = None  # (L, C - 1) int32: what each place predicts of them

    def part(self, start: int, stop: int) -> DocumentTokens:
        """Tokens ``start`` to ``stop`` alone; the last still predicts what comes after it.

        Second sequences stay whole, and labels with the first token.
        """
        cut = lambda items: tuple(p for f in items if (p := f.part(start, stop)) is not None)
        return self._replace(
            ids=self.ids[start:stop],
            targets=self.targets[start:stop],
            weights=self.weights[start:stop],
            modality=self.modality[start:stop],
            prefix=self.prefix[start:stop],
            features=cut(self.features),
            goals=cut(self.goals),
            position=None if self.position is None else self.position[start:stop],
            fields={name: each[start:stop] for name, each in self.fields.items()},
            labels=self.labels if start == 0 else NONE,
            codes=None if self.codes is None else self.codes[start:stop],
            code_targets=None if self.code_targets is None else self.code_targets[start:stop],
        )

    @property
    def target_modality(self) -> np.ndarray:
        """Range index of each target, (L,) int32; 0 = none. Of a whole document."""
        out = np.zeros(len(self.modality), np.int32)
        out[:-1] = self.modality[1:]
        return out


UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def highest(codes: np.ndarray) -> int:
    """The largest code; a negative one counts as larger than all others."""
    if codes.dtype.kind != "i" or not codes.flags.c_contiguous:
        low, high = int(codes.min()), int(codes.max())
        return high if low >= 0 else 2**63
    return int(np.maximum.reduce(codes.view(UNSIGNED[codes.itemsize])))


@lru_cache(maxsize=32)
def ranges(vocabulary: Vocabulary) -> Mapping[str, tuple[Range, TokenSpec]]:
    """Every modality's `Range` and spec, computed once a vocabulary."""
    return {spec.modality: (vocabulary.range(spec.modality), spec) for spec in vocabulary.ranges}


def document_tokens(segments: Sequence[Segment], vocabulary: Vocabulary) -> DocumentTokens:
    """Write one document's segments as ids of ``vocabulary``.

    Args:
        segments: in order; ``ids`` are local codes in [0, spec.n_ids). A condition without ids is
            the null condition. ``targets`` (codes, -1 = none) may replace what is predicted at each
            code; one entry more, -1, says that the segment was cut there, so that its ``end`` is no
            target. ``fields["masked"]`` (codes, bool) of a condition says which codes are hidden;
            other fields are named fields of the layout: one number for the whole segment with its
            begin and end, or one a code. ``position`` (codes, axes) stands on the axes from 1 on,
            counted from the segment's first code. ``room``: places of values that have not one
            each. ``part``: the second sequence it stands in; role "label": in none.
        vocabulary: gives every modality its range.
    Raises:
        UserError: the vocabulary lacks a modality.
        ValueError: a code lies outside its range (it would be read as another modality), a target
            has no ids, or values, positions or fields do not fit the segment's places.
    """
    names = {s.part for s in segments if s.part}
    if not names:
        return _sequence(segments, vocabulary)
    main = _sequence([s for s in segments if not s.part], vocabulary)
    if not len(main.ids):
        raise ValueError(f"part '{min(names)}' goes with nothing: the main sequence is empty")
    parts = {}
    for name in sorted(names):
        own = [s._replace(part="") for s in segments if s.part == name]
        if any(s.role != "condition" for s in own):
            raise ValueError(f"part '{name}' is read, not predicted: give it the role 'condition'")
        parts[name] = _sequence(own, vocabulary)
    return main._replace(parts=parts)


def _sequence(segments: Sequence[Segment], vocabulary: Vocabulary) -> DocumentTokens:
    table = ranges(vocabulary)
    around = borders(segments)
    lengths = lengths_within(segments, around)
    n = sum(lengths)
    # What is predicted of a place, and how much it counts, is told the place before: one more.
    stream, goal = np.empty(n, np.int32), np.empty(n + 1, np.int32)
    weight, modality = np.zeros(n + 1, np.float32), np.zeros(n, np.int32)
    prefix, hidden = np.zeros(n, np.int32), []
    features: list[Features] = []
    goals: list[Features] = []
    fields: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    position: np.ndarray | None = None
    further: np.ndarray | None = None
    further_goals: np.ndarray | None = None
    at, leading = 0, True
    for s, border, length in zip(segments, around, lengths, strict=True):
        if s.role == "label":
            labels[s.modality] = _label(s, vocabulary, labels)
            continue
        first = at + bool(border.begin)
        if s.fields and s.fields.keys() - {"masked"}:
            _mark(fields, s, slice(at, at + length), first, n)
        if s.ids is None:
            if s.role != "condition":
                raise ValueError(f"segment '{s.modality}': a target needs ids")
            stream[at] = goal[at] = NULL
            prefix[at] = leading
            at += 1
            continue
        if s.room and s.values is None:
            raise ValueError(f"segment '{s.modality}': room for {s.room} values, and none there")
        r, spec = table.get(s.modality) or (vocabulary.range(s.modality), None)
        codes = np.asarray(s.ids)
        last, stop = first + len(codes), at + length
        over = last  # the first place that `end` fills
        if codes.ndim == 2 and spec is not None:
            over = first + check_places(codes, spec)
            further = _further(codes[:, 1:], r, first, n, further)
            told = codes if np.ndim(s.targets) != 2 else s.targets[: len(codes)]
            further_goals = _further(told[:, 1:], r, first, n, further_goals)
            codes = codes[: over - first, 0]
        if s.values is not None:
            item = _features(s, first, spec)
            features.append(item)
            stream[first:last] = -1
            if s.role == "target":
                goals.append(item._replace(start=first - 1, grid=()))
        elif spec is not None and spec.continuous:
            raise ValueError(f"segment '{s.modality}': ids in place of values")
        elif len(codes):
            if highest(codes) >= r.stop - r.first:
                raise ValueError(
                    f"segment '{s.modality}': code {int(codes.min())}..{int(codes.max())} outside "
                    f"0..{r.stop - r.first - 1}"
                )
            np.add(codes, r.first, out=stream[first:over], casting="unsafe")
        modality[at:stop] = r.index
        if border.begin:
            host = r if border.begin == s.modality else vocabulary.range(border.begin)
            stream[at] = host.begin
            if host is not r:
                modality[at] = host.index
        if border.end:
            host = r if border.end == s.modality else vocabulary.range(border.end)
            stream[last] = host.end
            if host is not r:
                modality[last] = host.index
        if over < last:
            stream[over:last] = r.end
        goal[at:stop] = stream[at:stop]
        if over < last:
            goal[over + 1 : stop] = -1
        leading = leading and s.role == "condition"
        prefix[at:stop] = leading
        if s.role == "target":
            weight[first : min(stop, max(over + 1, last))] = s.weight
        if "masked" in s.fields:
            hidden.append((_masked(s, first), s.weight))
        if s.position is not None:
            position = _positions(s, first, n, position)
        if s.targets is not None:
            other = np.asarray(s.targets)
            if np.ndim(s.ids) == 1:
                own = other[: len(codes)]
                if s.values is None:
                    goal[first:last] = np.where(own < 0, -1, own + r.first)
                weight[first:last] *= own >= 0
            elif other.ndim == 2:
                own = other[: over - first, 0]
                goal[first:over] = np.where(own < 0, -1, own + r.first)
                goal[over] = -1 if len(other) > len(s.ids) else goal[over]
            if (
                len(other) > len(s.ids) and (other[-1] < 0).all()
            ):  # cut short: `end` stands here, but not because the item ends
                weight[last:stop] = 0.0
        at = stop
    goal[n] = -1
    targets, weights = goal[1:], weight[1:]
    for index, share in hidden:
        targets[index], weights[index], stream[index] = stream[index], share, MASK
    return DocumentTokens(
        stream,
        targets,
        weights,
        modality,
        prefix,
        tuple(features),
        tuple(goals),
        position,
        fields,
        labels,
        codes=further,
        code_targets=None if further_goals is None else _next(further_goals),
    )


def _next(codes: np.ndarray) -> np.ndarray:
    """What each place predicts of ``codes`` (L, C - 1); the last one nothing."""
    return np.pad(codes[1:], ((0, 1), (0, 0)), constant_values=-1)


def _further(
    codes: np.ndarray, r: Range, first: int, n: int, have: np.ndarray | None
) -> np.ndarray:
    """``have`` with the further codebooks of a segment whose first code stands at ``first``."""
    before = np.full((n, 0), -1, np.int32) if have is None else have
    more = max(0, codes.shape[1] - before.shape[1])
    out = np.pad(before, ((0, 0), (0, more)), constant_values=-1)
    out[first : first + len(codes), : codes.shape[1]] = np.where(codes < 0, -1, codes + r.first)
    return out


def _features(s: Segment, start: int, spec: TokenSpec | None) -> Features:
    """The values of a segment whose first place is ``start``. Raises ValueError."""
    where, shape = f"segment '{s.modality}'", np.shape(s.values)
    if spec is None or not spec.continuous:
        raise ValueError(f"{where}: values of a modality of ids")
    if len(shape) != 2 or shape[1] != spec.n_features:
        raise ValueError(f"{where}: values {shape}, its tokenizer gives {spec.n_features} a place")
    if (s.room or len(s.values)) != len(s.ids):
        room = f" and room for {s.room}" if s.room else ""
        raise ValueError(f"{where}: values {shape}{room} at {len(s.ids)} places")
    if s.role == "target" and s.room:
        raise ValueError(f"{where}: values that are predicted need a place each, not room")
    if s.grid and int(np.prod(s.grid)) != len(s.values):
        raise ValueError(f"{where}: grid {s.grid} has not {len(s.values)} cells")
    return Features(s.modality, start, s.values, tuple(s.grid), s.room)


def _masked(s: Segment, first: int) -> np.ndarray:
    """Places of the hidden codes of a condition."""
    if s.role != "condition" or s.values is not None or np.ndim(s.ids) != 1:
        raise ValueError(
            f"segment '{s.modality}': only codes of a condition, one a place, can be masked"
        )
    return first + np.flatnonzero(s.fields["masked"])


def _mark(fields: dict[str, np.ndarray], s: Segment, where: slice, first: int, n: int) -> None:
    """Write the named fields of a segment, whose first code is ``first`` of ``n`` tokens."""
    for name, given in s.fields.items():
        if name == "masked":
            continue
        values, told = np.asarray(given), f"segment '{s.modality}': field '{name}'"
        if name in RESERVED_FIELDS:
            raise ValueError(f"{told} is made by packing: take another name")
        if values.dtype.kind not in "iub" or values.shape not in ((), np.shape(s.ids)):
            raise ValueError(
                f"{told}: {values.dtype} {values.shape}, expected one integer or one a code"
            )
        into = fields.setdefault(name, np.zeros(n, np.int32))
        if values.ndim:
            into[first : first + len(values)] = values
        else:
            into[where] = values


def _positions(s: Segment, first: int, n: int, position: np.ndarray | None) -> np.ndarray:
    """``position`` with that of a segment whose first code stands at ``first``."""
    own = np.asarray(s.position)
    own = own[:, None] if own.ndim == 1 else own
    if own.dtype.kind not in "iu" or own.ndim != 2 or len(own) != len(s.ids):
        raise ValueError(
            f"segment '{s.modality}': positions {own.dtype} {np.shape(s.position)} at "
            f"{len(s.ids)} places: expected integers, one row a place"
        )
    before = np.zeros((n, 0), np.int32) if position is None else position
    more = max(0, own.shape[1] - before.shape[1])
    position = np.pad(before, ((0, 0), (0, more)), constant_values=DEFAULT)
    position[first : first + len(own), : own.shape[1]] = first + own
    return position


def _label(s: Segment, vocabulary: Vocabulary, have: Mapping[str, Any]) -> np.ndarray:
    """Ids of the vocabulary of a label."""
    r, where = vocabulary.range(s.modality), f"label '{s.modality}'"
    if s.values is not None or s.ids is None or s.part or s.modality in have:
        raise ValueError(f"{where}: one of codes, of the whole document, is expected")
    codes = np.asarray(s.ids)
    if len(codes) and (codes.min() < 0 or codes.max() >= r.stop - r.first):
        raise ValueError(f"{where}: a code outside 0..{r.stop - r.first - 1}")
    return (codes + r.first).astype(np.int32)


def of_array(spec: TokenSpec, array: np.ndarray) -> Segment:
    """The segment of what a token shard holds of an item: codes (L,), or values (..., C)."""
    if not spec.continuous:
        return Segment(spec.modality, array)
    values = array.reshape(-1, array.shape[-1])
    grid = array.shape[:-1] if array.ndim > 2 else ()
    ids = np.broadcast_to(NO_ID, len(values))
    return Segment(spec.modality, ids, values, role="condition", grid=grid, inline=spec.inline)
