"""A small trained base of text, and one of words and recordings, for the tests of `mm finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mm.cli.main import run as mm

MODEL = {
    "kind": "lm",
    "d_model": 32,
    "backbone": {
        "kind": "stack",
        "depth": 2,
        "pattern": "rg_lru attention",
        "mixers": {"attention": {"heads": 2}},
        "ffn": {"kind": "swiglu", "hidden": 64},
    },
}


def call(*words: Any) -> int:
    return mm([str(word) for word in words])


def text_base(root: Path, book: Path, steps: int = 30) -> Path:
    """The run folder of a small model of bytes, trained on the beginning of a book."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "bytes.yaml").write_text("tokenizer: {kind: bytes, modality: bytes}\n")
    data, tokens, words = root / "data", root / "tokens", root / "tokenizers"
    assert not call("data", "pack", book, "--out", data, "--val-share", 0.2)
    assert not call(
        "tokenizer", "train", root / "bytes.yaml", "--data", data, "--out", words / "bytes"
    )
    assert not call("data", "pack", data, "--tokenizers", words, "--out", tokens)
    stage = {
        "data": {
            "kind": "packed",
            "seq_len": 128,
            "batch_size": 4,
            "cut": True,
            "sources": [{"path": str(tokens)}],
        },
        "objective": "next_token",
        "optimizer": {"kind": "adamw", "lr": 1.0e-2},
        "budget": {"steps": steps},
        "tasks": [{"kind": "bits_per_byte", "data": str(data), "split": "val", "limit": 20}],
    }
    run = {
        "name": "base",
        "out": str(root),
        "vocabulary": str(tokens / "vocabulary.json"),
        "tokenizers": {"bytes": str(words / "bytes")},
        "model": MODEL,
        "stages": [stage],
        "evaluate": False,
        "tracking": {"sinks": []},
    }
    (root / "base.yaml").write_text(yaml.safe_dump(run))
    assert not call("train", root / "base.yaml")
    return root / "base"
