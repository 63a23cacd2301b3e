"""mm: raw text, images and audio to one trained, resumed, sampled and measured any-to-any model."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Lazy, so that `mm --help` and mm.launch start without torch.
_EXPORTS = {
    "Model": "mm.model.model",
    "Run": "mm.run",
    "Trainer": "mm.trainer.loop",
    "UserError": "mm.errors",
    "Vocabulary": "mm.vocabulary",
    "generate": "mm.decoders.generate",
    "load_tokenizer": "mm.tokenizers.load",
    "pack": "mm.data.pack.job",
    "train": "mm.trainer.loop",
}
__all__ = sorted(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mm' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
