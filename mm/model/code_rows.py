"""Embedding rows from the vectors that a tokenizer has for its codes: alike codes begin alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mm.specs import TokenSpec
from mm.vocabulary import Range, Vocabulary


def rows_of_codes(vectors: np.ndarray, spec: TokenSpec, index: int, d_model: int) -> np.ndarray:
    """`(n_ids, d_model)` float32: a fixed random projection of the standardised vectors.

    Args:
        vectors: `(n_ids, C)`, of each code of each book.
        spec: of the modality.
        index: of its range; the projection depends on it.
    """
    books = np.asarray(vectors, np.float32).reshape(spec.n_codebooks, spec.vocab_size, -1)
    books = books - books.mean(1, keepdims=True)
    books = books / np.maximum(np.sqrt((books**2).mean((1, 2), keepdims=True)), 1e-8)
    flat = books.reshape(spec.n_ids, -1)
    C = flat.shape[1]
    rng = np.random.default_rng([17, index])
    return flat @ rng.standard_normal((C, d_model)).astype(np.float32) / np.sqrt(C * d_model)


@torch.no_grad()
def seed_rows(
    rows_of: Callable[[Range], Tensor],
    vocabulary: Vocabulary,
    code_vectors: Mapping[str, np.ndarray],
) -> None:
    """Set rows `(n_ids, D)` of codes to 97 % of their projected vectors and 3 % of their own."""
    for modality, vectors in code_vectors.items():
        span, spec = vocabulary.range(modality), vocabulary.spec(modality)
        own = rows_of(span)
        new = torch.from_numpy(rows_of_codes(vectors, spec, span.index, own.shape[1])).to(own)
        own.copy_(0.97**0.5 * new + 0.03**0.5 * own)
