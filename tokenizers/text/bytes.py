"""Bytes as they are: 256 ids, nothing to train, for the files of any modality.

``modality: bytes`` is text as bytes, beside `text`; ``modality: image`` takes the picture's place:
its ids are the bytes of the file, PNG or JPEG, and what a model writes is a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.data.modalities.base import TEXT, raw_modality, table
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, ModalityTokenizer, TokenSpec
from mm.tokenizers.load import fingerprint_of, load_tokenizer, write_folder
from mm.tokenizers.text.words import Words


class BytesTokenizer(ModalityTokenizer):
    """``bytes`` (or a str, as UTF-8) to one id a byte; `decode` gives ``bytes``.

    Any other raw value is written as a file of its modality first: a picture as PNG, and so on.
    """

    reads_files: ClassVar[bool] = True

    def __init__(self, config: BytesConfig, words: Words | None = None):
        self.config, self.words = config, words or Words()
        self.spec = TokenSpec(config.modality, 256, fingerprint=fingerprint_of(config))

    def encode(self, raws: Sequence[bytes | str]) -> list[Encoded]:
        """Ids of each value. Raises UserError on anything but bytes and str."""
        rows = (np.frombuffer(self._as_bytes(raw), np.uint8) for raw in raws)
        return [Encoded(row.astype(np.int32)) for row in rows]

    def decode(self, codes: Sequence[Encoded]) -> list[bytes]:
        return [np.asarray(code.ids).reshape(-1).astype(np.uint8).tobytes() for code in codes]

    def save(self, folder: str | Path) -> None:
        write_folder(folder, self.config, beside=self.words.files())

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        return load_tokenizer(folder)

    def _as_bytes(self, raw: Any) -> bytes:
        if isinstance(raw, str):
            return raw.encode("utf-8", "surrogatepass")
        if isinstance(raw, (bytes, bytearray, memoryview)):
            return bytes(raw)
        if self.config.modality in table().raw:
            own = raw_modality(self.config.modality)
            if not own.is_text and own.owns(raw):
                return own.file_of(raw)
        raise UserError(
            f"bytes tokenizer of {self.config.modality}: expected bytes or str, "
            f"got {type(raw).__name__}"
        )


@TOKENIZERS.register("bytes")
class BytesConfig(Config):
    """256 ids, one a byte."""

    kind: Literal["bytes"] = "bytes"
    modality: Annotated[
        str, Field(description="bytes: of text; image, audio, ...: of their files as they are")
    ] = "bytes"

    def fit(self, texts: Iterable[Any] = ()) -> BytesTokenizer:
        """Nothing to learn; of texts the words are noted."""
        words = Words()
        if self.modality not in table().raw or raw_modality(self.modality).kind == TEXT:
            for _ in words.watch(texts):
                if words.known is None:
                    break
        return BytesTokenizer(self, words)

    def build(self, folder: str | Path | None = None) -> BytesTokenizer:
        """Make it; its folder holds nothing but this config, and words."""
        return BytesTokenizer(self, Words.read(folder))

    @classmethod
    def smallest_tokenizer(cls) -> BytesTokenizer:
        """An instance for the laws."""
        return cls().build()

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        return [b"", bytes(range(256)), b"\x00\xff\xfe", "<|image|> 漢字".encode(), b"abc" * 50]
