"""Bytes as they are: 256 ids, nothing to train. A modality of its own, beside text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mm.config import Config
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, ModalityTokenizer, TokenSpec
from mm.tokenizers.load import fingerprint_of, load_tokenizer, write_folder


class BytesTokenizer(ModalityTokenizer):
    """``bytes`` (or a str, as UTF-8) to one id a byte; `decode` gives ``bytes``."""

    def __init__(self, config: BytesConfig):
        self.config = config
        self.spec = TokenSpec(config.modality, 256, fingerprint=fingerprint_of(config))

    def encode(self, raws: Sequence[bytes | str]) -> list[Encoded]:
        """Ids of each value. Raises UserError on anything but bytes and str."""
        return [Encoded(np.frombuffer(_as_bytes(raw), np.uint8).astype(np.int32)) for raw in raws]

    def decode(self, codes: Sequence[Encoded]) -> list[bytes]:
        return [np.asarray(code.ids).reshape(-1).astype(np.uint8).tobytes() for code in codes]

    def save(self, folder: str | Path) -> None:
        write_folder(folder, self.config)

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        return load_tokenizer(folder)


def _as_bytes(raw: Any) -> bytes:
    if isinstance(raw, str):
        return raw.encode("utf-8", "surrogatepass")
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return bytes(raw)
    raise UserError(f"bytes tokenizer: expected bytes or str, got {type(raw).__name__}")


@TOKENIZERS.register("bytes")
class BytesConfig(Config):
    """256 ids, one a byte."""

    kind: Literal["bytes"] = "bytes"
    modality: str = "bytes"

    def fit(self, texts: Iterable[Any] = ()) -> BytesTokenizer:
        """Nothing to learn; ``texts`` are not read."""
        return BytesTokenizer(self)

    def build(self, folder: str | Path | None = None) -> BytesTokenizer:
        """Make it; its folder holds nothing but this config."""
        return BytesTokenizer(self)

    @classmethod
    def smallest_tokenizer(cls) -> BytesTokenizer:
        """An instance for the laws."""
        return cls().build()

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        return [b"", bytes(range(256)), b"\x00\xff\xfe", "<|image|> 漢字".encode(), b"abc" * 50]
