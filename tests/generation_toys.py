"""What the tests of generation share."""

from __future__ import annotations

import torch

from mm.decoders.base import Session
from mm.specs import TokenSpec
from mm.vocabulary import extend_vocabulary

VOCABULARY = extend_vocabulary(
    [
        TokenSpec("text", 20, fingerprint="t"),
        TokenSpec("image", 8, grid=(2, 3), fingerprint="i"),
        TokenSpec("audio", 5, n_codebooks=2, fingerprint="a"),
        TokenSpec("deep", 4, n_codebooks=3, grid=(2,), fingerprint="d"),
    ]
)


V = VOCABULARY.size


def session(to: str, *length: int, limit: int = 100) -> Session:
    return Session(VOCABULARY, to, torch.tensor(length), torch.full((len(length),), limit))
