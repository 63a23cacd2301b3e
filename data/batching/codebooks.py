"""Codes of several codebooks: flat, one after another, or of one frame in one place.

L codes, C codebooks, F frames, T places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm.specs import TokenSpec
from mm.vocabulary import Vocabulary

CODES = "codes"  # the head that predicts all codebooks of a place but the first


def lay_out(ids: np.ndarray, delays: Sequence[int]) -> np.ndarray:
    """Flat codes `(L,)` to places `(T, C)`: code q of frame t at place ``t + delays[q]``.

    -1 = none. T is the number of frames, and the longest delay more. What `flat_codes` gives back.

    Raises ValueError where the codes are no whole frames.
    """
    C = len(delays)
    if len(ids) % C:
        raise ValueError(f"{len(ids)} codes are no whole frames of {C} codebooks")
    frames = np.asarray(ids).reshape(-1, C)
    out = np.full((len(frames) + max(delays) if len(frames) else 0, C), -1, np.int32)
    for q, delay in enumerate(delays):
        out[delay : delay + len(frames), q] = frames[:, q]
    return out


def flat_codes(ids: np.ndarray) -> np.ndarray:
    """Places `(T, C)` of one item, whatever its delays, to flat codes `(L,)` of whole frames."""
    books = [column[column >= 0] for column in np.asarray(ids).T]
    whole = min(map(len, books))
    return np.stack([book[:whole] for book in books], 1).reshape(-1)


def check_places(ids: np.ndarray, spec: TokenSpec) -> int:
    """Frames of local codes `(T, C)`. Raises ValueError where they are no layout of the spec."""
    where, n = f"segment '{spec.modality}'", int((ids[:, 0] >= 0).sum())
    if ids.shape[1] != spec.n_codebooks:
        raise ValueError(f"{where}: {ids.shape[1]} codes a place of {spec.n_codebooks} codebooks")
    if (ids[:n, 0] < 0).any():
        raise ValueError(f"{where}: the first codebook has a gap")
    book = ids // max(1, spec.vocab_size)
    wrong = (ids >= 0) & (book != np.arange(ids.shape[1]))
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise ValueError(f"{where}: code {int(ids[tuple(at)])} is not of codebook {int(at[1])}")
    return n


def flat_stream(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Ids `(T, S)` of a row to `(L,)`: of whole items in streams, as flat ones have them."""
    first = ids[:, 0]
    if ids.shape[1] == 1:
        return first
    several = [s.modality for s in vocabulary.ranges if s.n_codebooks > 1]
    begins = (
        (int(i), r)
        for r in map(vocabulary.range, several)
        for i in np.flatnonzero(first == r.begin)
    )
    out, at = [], 0
    for begin, r in sorted(begins):
        own = (first[begin + 1 :] >= r.end) & (first[begin + 1 :] < r.stop)
        stop = begin + 1 + (len(own) if own.all() else int(np.argmin(own)))
        codes = ids[begin + 1 : stop, : vocabulary.ranges[r.index - 1].n_codebooks]
        if not (codes[:, 1:] >= 0).any():
            continue
        out += [first[at : begin + 1], flat_codes(np.where(codes >= r.first, codes, -1))]
        at = stop - int(first[stop - 1] == r.end)  # where the first codebook is over: one `end`
    return np.concatenate([*out, first[at:]])
