"""Segments to prompt batches: what may be generated from, checked by name. T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mm.batch import Batch
from mm.data.batching.borders import segment_lengths
from mm.data.batching.codebooks import lay_out
from mm.data.batching.collate import (
    EMPTY,
    Piece,
    axes_of,
    grids_of,
    pieces_to_batch,
    values_of,
)
from mm.data.batching.document import DocumentTokens, Features, document_tokens
from mm.data.transforms.delay import Delay
from mm.decoders.base import is_fixed
from mm.errors import UserError
from mm.layout import Doc, Grid, Layout
from mm.mask_expression import looks_ahead
from mm.specs import NONE, Segment, TokenSpec
from mm.vocabulary import Vocabulary

DEFAULT_MAX_TOKENS = 512  # of a span whose length is free
MAX_PROMPT_TOKENS = 16_384  # a mask of all pairs of them is 256 MiB


def require_causal(model: Any, vocabulary: Vocabulary, to: str) -> None:
    """Raise UserError where the model's mask shows a token of ``to`` what comes after it."""
    mask = getattr(model, "mask", None)
    if mask is not None and looks_ahead(mask, vocabulary.range(to).index):
        raise UserError(
            f"the mask {mask.key} shows '{to}' what comes after: token by token it is neither "
            "generated nor scored; train a stage under a mask that is causal there"
        )


def require_short(n_tokens: int, most: int, origin: str) -> None:
    """Raise UserError where a prompt has more ids than ``most``, with the key that raises it."""
    if n_tokens > most:
        raise UserError(
            f"{origin}: a prompt of {n_tokens:,} tokens; the limit is {most:,}, because attention "
            f"takes memory of its square: shorten it, or --max-prompt-tokens {n_tokens}"
        )


class Stream(NamedTuple):
    """Tokens of a prompt, with the values that stand among them."""

    ids: np.ndarray  # (T,) or (T, S) int32
    features: tuple[Features, ...] = ()
    parts: Mapping[str, DocumentTokens] = NONE  # second sequences
    opening: int = 0  # tokens before what is generated, its begin, and what of it is given

    @property
    def n_tokens(self) -> int:
        """Of all sequences."""
        return len(self.ids) + sum(len(part.ids) for part in self.parts.values())

    @property
    def content(self) -> bytes:
        """Equal where two streams are."""
        out = [str(self.ids.shape).encode(), self.ids.tobytes(), b"%d" % self.opening]
        out += map(_content, self.features)
        for name, part in self.parts.items():
            out += [name.encode(), streams_of(part).tobytes(), *map(_content, part.features)]
        return b"|".join(out)


def _content(f: Features) -> bytes:
    return f"{f.start} {f.grid} {f.room} ".encode() + f.data.tobytes()


class Prompt(NamedTuple):
    """One sequence to go on with."""

    tokens: Stream
    null: Stream
    have: int  # local ids of the unfinished span
    limit: int  # most ids of that span
    known: np.ndarray | None = None  # (longest delay, C) ids of the span's next places, -1 = none


def streams_of(d: DocumentTokens) -> np.ndarray:
    """Ids `(L, S)` of a document."""
    return d.ids[:, None] if d.codes is None else np.concatenate([d.ids[:, None], d.codes], 1)


def _widen(ids: np.ndarray, S: int) -> np.ndarray:
    return np.pad(ids, ((0, 0), (0, S - ids.shape[1])), constant_values=-1)


def check(
    segment: Segment, vocabulary: Vocabulary, *, whole: bool, origin: str = "prompt"
) -> np.ndarray:
    """Local ids of a segment `(L,)` int64.

    Args:
        whole: the span must be finished; otherwise it must be able to go on.
    Raises:
        UserError: ids out of range, a span that breaks off inside a frame or a grid, or one with
            nothing left to add; the model would read it as something it never saw and answer noise.
    """
    spec = vocabulary.spec(segment.modality)
    if spec.continuous:
        return _check_values(segment, spec, origin)
    ids = np.asarray([] if segment.ids is None else segment.ids, np.int64).reshape(-1)
    where = f"{origin}: {segment.modality} span"
    if len(ids) and (ids.min() < 0 or ids.max() >= spec.n_ids):
        raise UserError(
            f"{where}: ids must be in 0..{spec.n_ids - 1}, found {ids.min()}..{ids.max()}"
        )
    total = is_fixed(spec)
    if whole and total is not None and len(ids) != total:
        raise UserError(
            f"{where} is unfinished: it has {len(ids)} ids and needs {total}; give all of them, or "
            f"make it the last segment, with role 'target', and generate to '{segment.modality}'"
        )
    if whole and total is None and len(ids) == 0:
        raise UserError(f"{where} is empty: it has 0 ids and needs at least {spec.n_codebooks}")
    if not whole and total is not None and len(ids) >= total:
        raise UserError(
            f"{where} is complete ({len(ids)} of {total} ids): there is nothing to continue"
        )
    if len(ids) % spec.n_codebooks and (whole or total is None):
        raise UserError(
            f"{where} breaks off inside a frame: it has {len(ids)} ids and needs a multiple of "
            f"{spec.n_codebooks} (one id of each codebook)"
        )
    books = ids // spec.vocab_size
    if (books != np.arange(len(ids)) % spec.n_codebooks).any():
        raise UserError(
            f"{where}: codebooks are out of order; id i must belong to book i % {spec.n_codebooks}"
        )
    return ids


def _check_values(segment: Segment, spec: TokenSpec, origin: str) -> np.ndarray:
    shape = np.shape(segment.values)
    n = segment.room or shape[0]
    if len(shape) != 2 or shape[1] != spec.n_features or n != len(segment.ids):
        raise UserError(
            f"{origin}: {spec.modality} span: values of shape {shape}, expected (places, "
            f"{spec.n_features})"
        )
    return np.asarray(segment.ids, np.int64)


def continues(segments: Sequence[Segment], to: str) -> bool:
    """True where the last segment is an unfinished span of ``to`` to go on with."""
    return bool(segments) and segments[-1].modality == to and segments[-1].role == "target"


def prepare(
    segments: Sequence[Segment],
    to: str,
    vocabulary: Vocabulary,
    max_tokens: int | None,
    origin: str,
    repeats: int = 1,
    delays: Mapping[str, tuple[int, ...]] = NONE,
) -> Prompt:
    """Check one prompt and write its token stream up to where generation begins.

    A last segment of modality ``to`` and role "target" is the unfinished span to go on with; all
    others are conditions, written ``repeats`` times in a row. Without any segment the model is
    asked unconditionally (null condition). ``delays``: how the model reads codebooks that share a
    place; then the lengths count places of the first one.

    Raises:
        UserError: see `check`; or ``max_tokens`` leaves no room for a span.
    """
    spec = vocabulary.spec(to)
    if spec.continuous:
        made = [s.modality for s in vocabulary.ranges if not s.continuous]
        raise UserError(
            f"{origin}: '{to}' is values, not ids: a series goes on by mm.decoders.forecast, "
            f"ids are written of: {', '.join(made) or 'nothing'}"
        )
    conditions, prefix = list(segments), np.zeros(0, np.int64)
    if continues(segments, to):
        prefix = check(conditions.pop(), vocabulary, whole=False, origin=origin)
    for segment in conditions:
        if segment.ids is not None:
            check(segment, vocabulary, whole=True, origin=origin)
    if not conditions and len(prefix) == 0:
        conditions = [Segment(to)]
    if repeats < 1:
        raise UserError(f"repeats must be 1 or more, not {repeats}")
    conditions *= repeats
    # As condition dropout in training: every condition becomes a null condition, all together.
    null = [Segment(s.modality, role="condition", part=s.part) for s in conditions]
    given = [segment._replace(role="condition") for segment in conditions]
    known: np.ndarray | None = None
    given = Delay(delays)(given)
    begun = Segment(to, prefix, role="target")
    if to in delays:
        target = vocabulary.range(to)
        places = lay_out(target.first + prefix, delays[to])
        n = len(prefix) // spec.n_codebooks
        begin = _widen(np.array([[target.begin]], np.int32), spec.n_codebooks)
        opening, known = np.concatenate([begin, places[:n]]), _known(places[n:], delays[to])

    def stream(segments: Sequence[Segment]) -> Stream:
        main = [s for s in segments if not s.part] + ([begun] if known is None else [])
        made, lengths = document_tokens(main, vocabulary), segment_lengths(main)
        told = streams_of(made)
        parts = {
            name: document_tokens(
                [s._replace(part="") for s in segments if s.part == name], vocabulary
            )
            for name in sorted({s.part for s in segments} - {""})
        }
        if known is None:
            ids = told[:-1, 0] if told.shape[1] == 1 else told[:-1]
            return Stream(ids, made.features, parts, len(told) - lengths[-1])
        S = max(told.shape[1], opening.shape[1])
        ids = np.concatenate([_widen(told, S), _widen(opening, S)])
        return Stream(ids[:, 0] if S == 1 else ids, made.features, parts, len(told))

    total = is_fixed(spec)
    if total is not None:
        if max_tokens is not None and max_tokens < total:
            raise UserError(
                f"max_tokens={max_tokens} cuts the '{to}' span short: it always has {total} ids; "
                "leave it out"
            )
        limit = total
    else:
        room = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        room -= room % spec.n_codebooks
        if room < 1:
            raise UserError(
                f"max_tokens={max_tokens}: one frame of '{to}' takes {spec.n_codebooks} ids"
            )
        limit = len(prefix) + room
    books = spec.n_codebooks if to in delays else 1
    return Prompt(stream(given), stream(null), len(prefix) // books, limit // books, known)


def _known(places: np.ndarray, delays: Sequence[int]) -> np.ndarray:
    """What a prompt holds of the places after it, padded to the longest delay."""
    return np.pad(places, ((0, max(delays) - len(places)), (0, 0)), constant_values=-1)


def batch(streams: Sequence[Stream], vocabulary: Vocabulary) -> Batch:
    """Lay one stream a row, slot i, padded at the right; the head is asked at each last place.

    What stands before the span that is generated is the prefix.
    """
    T = max(len(stream.ids) for stream in streams)
    told = [s.ids.reshape(len(s.ids), -1) for s in streams]
    ids = np.full((len(streams), T, max(each.shape[1] for each in told)), -1, np.int32)
    rows = []
    items: dict[str, list[tuple[int, Features]]] = {}
    for i, (each, s) in enumerate(zip(told, streams, strict=True)):
        features, opening = s.features, s.opening
        ids[i, : len(each), : each.shape[1]] = each
        stream = each[:, 0]
        modality = vocabulary.modality_of(stream)
        grids = grids_of(stream, vocabulary, each.shape[1] > 1)
        for f in features:
            modality[f.start : f.start + f.places] = vocabulary.range(f.modality).index
            grids += [Grid(f.start, f.grid)] if f.grid and not f.room else []
            items.setdefault(f.modality, []).append((i * T + f.start, f))
        prefix = (np.arange(len(stream)) < opening).astype(np.int32)
        extra = {"prefix": prefix}
        rows.append([Doc(len(stream), modality=modality, extra=extra, slot=i, grids=grids)])
    layout = Layout.from_rows(rows, T, axes=axes_of(vocabulary))
    lengths = torch.tensor([len(stream.ids) for stream in streams], dtype=torch.int32)
    tokens = torch.from_numpy(ids)
    names = sorted({name for stream in streams for name in stream.parts})
    return Batch(
        layout,
        tokens,
        torch.full_like(tokens, -1),
        torch.zeros(len(streams), T),
        places={"tokens": layout.cu_seqlens[:-1] + lengths - 1},
        values={modality: values_of(each) for modality, each in items.items()},
        parts={name: _second(name, streams, vocabulary) for name in names},
    )


def _second(name: str, streams: Sequence[Stream], vocabulary: Vocabulary) -> Batch:
    """The second sequence of each stream, empty where it has none."""
    own = [stream.parts.get(name, EMPTY) for stream in streams]
    rows = [[Piece(d, d.target_modality, slot=i)] for i, d in enumerate(own)]
    return pieces_to_batch(rows, vocabulary)


def distinct(streams: Sequence[Stream]) -> tuple[list[Stream], np.ndarray]:
    """The different streams, and which of them each one is `(N,)`."""
    number: dict[bytes, int] = {}
    rows = np.array([number.setdefault(s.content, len(number)) for s in streams], np.int64)
    first = {int(row): stream for row, stream in zip(rows[::-1], streams[::-1], strict=True)}
    return [first[row] for row in range(len(number))], rows
