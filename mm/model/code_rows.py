"""Embedding rows from the vectors that a tokenizer has for its codes: alike codes begin alike."""

from __future__ import annotations

import numpy as np

from mm.specs import TokenSpec


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
