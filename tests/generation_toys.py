"""What the tests of generation share."""

from __future__ import annotations

from pathlib import Path

import torch

from mm.decoders.base import Session
from mm.model.layer import init_weights
from mm.registry import NETWORKS
from mm.specs import TokenSpec
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.text.bpe import BpeConfig
from mm.tokenizers.text.bytes import BytesConfig
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


CAPTIONS = ["the digit seven", "the digit three"]


def save_model(root: Path, **tokenizers: BpeConfig | BytesConfig) -> Path:
    """A saved random model of these tokenizers, by modality."""
    for name, config in tokenizers.items():
        config.fit(CAPTIONS).save(root / "tokenizers" / name)
    folders = {name: root / "tokenizers" / name for name in tokenizers}
    vocabulary = extend_vocabulary([load_tokenizer(f).spec for f in folders.values()])
    torch.manual_seed(0)
    config = {"kind": "lm", "d_model": 16, "backbone": {"kind": "stack", "depth": 1}}
    model = NETWORKS.parse(config).build(vocabulary)
    init_weights(model)
    model.save_pretrained(root / "model", vocabulary=vocabulary, tokenizers=folders)
    return root
