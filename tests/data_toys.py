"""Small raw files and token shards that the data tests share."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mm.data.pack.job import pack
from mm.data.pack.report import PackReport
from mm.specs import Encoded, ModalityTokenizer, TokenSpec, Waveform


def png(n: int = 0, size: int = 8) -> bytes:
    """A small PNG whose pixels depend on ``n``."""
    out = io.BytesIO()
    pixels = np.random.default_rng(n).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def wav(n: int = 0, frames: int = 400, rate: int = 8000, channels: int = 1) -> bytes:
    """A short WAV whose samples depend on ``n``."""
    out = io.BytesIO()
    noise = np.random.default_rng(n).uniform(-0.5, 0.5, (frames, channels)).astype(np.float32)
    soundfile.write(out, noise, rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def folder(root: Path, n: int = 6, splits: Sequence[str] = ("train", "test")) -> Path:
    """``n`` samples of text, image and audio a split, paired by stem."""
    for split in splits:
        (root / split).mkdir(parents=True)
        for i in range(n):
            stem = root / split / f"item{i:03d}"
            stem.with_suffix(".txt").write_text(f"{split} caption {i}")
            stem.with_suffix(".png").write_bytes(png(i))
            stem.with_suffix(".wav").write_bytes(wav(i))
    return root


def tar_of(path: Path, members: Sequence[tuple[tarfile.TarInfo | str, bytes]]) -> Path:
    """Write a tar with exactly these members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


class ToyTokenizer(ModalityTokenizer):
    """Codes from simple statistics; counts what it was asked to encode."""

    def __init__(self, modality: str, n: int = 16, books: int = 1):
        self.spec = TokenSpec(modality, n, books, fingerprint=f"toy-{modality}-{n}-{books}")
        self.seen = 0

    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        self.seen += len(raws)
        return [self._one(raw) for raw in raws]

    def _one(self, raw: Any) -> Encoded:
        n = self.spec.n_ids
        if isinstance(raw, str):
            return Encoded(np.frombuffer(raw.encode(), np.uint8).astype(np.int32) % n)
        if isinstance(raw, Waveform):
            level = np.abs(np.asarray(raw.samples)[::40]) * 2 * n
            side = {"length": np.int64(len(raw.samples)), "sample_rate": raw.sample_rate}
            return Encoded(level.astype(np.int32) % n, side=side)
        return Encoded(np.asarray(raw)[::4, ::4, 0].reshape(-1).astype(np.int32) * n // 256)

    def decode(self, codes: Sequence[Encoded]) -> list[Any]:
        return ["".join(chr(97 + int(i) % 26) for i in np.asarray(c.ids)) for c in codes]

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError("lives in a test only")

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        raise NotImplementedError("lives in a test only")


def toys() -> dict[str, ToyTokenizer]:
    """One tokenizer a modality."""
    return {m: ToyTokenizer(m, n) for m, n in (("text", 64), ("image", 16), ("audio", 32))}


def token_shards(root: Path, n: int = 37, val_share: float = 0.0, **kw: Any) -> PackReport:
    """``n`` samples as token shards in ``root/tokens``; every fourth has text only."""
    raw = root / "raw"
    raw.mkdir(parents=True)
    rows = []
    for i in range(n):
        row = {"key": f"s{i:03d}", "text": "word " * (1 + i % 5) + str(i), "label": i % 3}
        if i % 4:
            (raw / f"{i}.png").write_bytes(png(i))
            (raw / f"{i}.wav").write_bytes(wav(i, 200 + 80 * (i % 3)))
            row |= {"image": f"{i}.png", "audio": f"{i}.wav"}
        rows.append(row)
    (raw / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {"progress": False, "shard_mb": 0.02, "val_share": val_share}
    pack(raw / "rows.jsonl", root / "shards", **settings)
    return pack(
        root / "shards", root / "tokens", tokenizers=toys(), progress=False, shard_mb=0.02, **kw
    )
