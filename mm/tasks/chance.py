"""What a uniform guess costs: every id that the grammar of a span allows is equally likely.

P places.
"""

from __future__ import annotations

import numpy as np

from mm.decoders.base import is_fixed
from mm.specs import TokenSpec


def uniform_nats(n: int, spec: TokenSpec) -> float:
    """Nats of a span of ``n`` ids, with its end."""
    place = np.arange(n + 1)
    return float(nats_at(place, place == n, spec).sum())


def nats_at(place_P: np.ndarray, is_end_P: np.ndarray, spec: TokenSpec) -> np.ndarray:
    """Nats of single ids of spans: (P,) float64.

    A grid's end is certain. Elsewhere every code of the book whose turn it is may come and, at the
    border of a frame, the end; the first id of a span is never its end.

    Args:
        place_P: (P,) int, number of the id in its span, the end's being the span's length.
        is_end_P: (P,) bool, it is the end.
    Raises:
        ValueError: values, of which there is no number to guess from.
    """
    if spec.continuous:
        raise ValueError(f"'{spec.modality}' has values in place of ids: there is no chance level")
    K = spec.vocab_size
    if is_fixed(spec):
        return np.where(is_end_P, 0.0, np.log(K))
    border = (place_P > 0) & ((place_P % spec.n_codebooks == 0) | is_end_P)
    return np.where(border, np.log(K + 1), np.log(K))
