"""Real tokenizers, packed pictures with captions, and a tiny language model: runs from raw data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from data_toys import png

from mm.data.pack.job import pack
from mm.model.layer import init_weights
from mm.run import Run
from mm.tokenizers.image.vq import ImageVqConfig
from mm.tokenizers.text.bpe import BpeConfig

WORDS = ("cat", "dog")


def image_tokenizer(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An untrained image tokenizer of 2 x 2 tokens, saved."""
    torch.manual_seed(seed)
    net = ImageVqConfig.smallest().model_copy(update=settings).build()
    init_weights(net)
    net.save_pretrained(folder)
    return folder


def packed(root: Path, n: int = 40) -> Path:
    """``root/{raw,tokenizers,data,tokens}``: n captioned pictures; every eighth caption is long."""
    for split, count in (("train", n), ("val", 8)):
        folder = root / "raw" / split
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i:03d}.png").write_bytes(png(i))
            words = f"a {WORDS[i % 2]} {i} "
            (folder / f"{i:03d}.txt").write_text(words * (30 if i % 8 == 0 else 1))
    bpe = BpeConfig(vocab_size=270).fit(["a cat 1 a dog 2"] * 3)
    bpe.save(root / "tokenizers" / "text")
    image_tokenizer(root / "tokenizers" / "image")
    pack(root / "raw", root / "data", progress=False)
    pack(root / "data", root / "tokens", tokenizers=root / "tokenizers", progress=False)
    return root


def values(root: Path, out: Path, name: str = "run", *, steps: int = 2, **change: Any) -> Any:
    """The run as plain values; ``change`` merges into stage (as ``stage``), data and the rest."""
    data = {
        "kind": "packed",
        "sources": [{"path": str(root / "tokens")}],
        "seq_len": 512,
        "batch_size": 2,
        "block_samples": 16,
    }
    stage = {
        "data": data | change.pop("data", {}),
        "objective": "next_token",
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "schedule": {"shape": "constant", "warmup": 0},
        "budget": {"steps": steps},
    }
    ffn, mixers = {"kind": "swiglu", "hidden": 32}, {"attention": {"heads": 2}}
    backbone = {"kind": "stack", "pattern": "attention", "mixers": mixers, "ffn": ffn}
    return {
        "name": name,
        "out": str(out),
        "vocabulary": str(root / "tokens" / "vocabulary.json"),
        "tokenizers": {m: str(root / "tokenizers" / m) for m in ("text", "image")},
        "model": {"kind": "lm", "d_model": 16, "backbone": backbone},
        "stages": [stage | change.pop("stage", {})],
        "engine": {"zero_stage": 1, "precision": "fp32"} | change.pop("engine", {}),
        **change,
    }


def make_run(root: Path, out: Path, name: str = "run", **change: Any) -> Run:
    return Run.model_validate(values(root, out, name, **change))


def files(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
