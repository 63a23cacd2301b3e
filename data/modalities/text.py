"""Text: UTF-8. A raw value is a str, or the bytes that a tokenizer of bytes gives back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from mm.data.modalities.base import BadSample, Modality
from mm.registry import MODALITIES

PREVIEW = 200  # characters


@MODALITIES.register("text")
class TextModality(Modality):
    """Strict UTF-8; a byte-order mark is dropped. Length: bytes."""

    kind: Literal["text"] = "text"
    max_text_bytes: int = 16_000_000

    order: ClassVar[int] = 0
    extensions: ClassVar[tuple[str, ...]] = ("txt",)
    value_name: ClassVar[str] = "text"
    tokens: ClassVar[Mapping[str, int]] = {"text": 1, "bytes": 4}
    any_ending: ClassVar[bool] = True
    is_text: ClassVar[bool] = True

    def decode(self, data: bytes) -> str:
        if len(data) > self.max_text_bytes:
            raise BadSample(f"text: {len(data)} bytes, more than the cap of {self.max_text_bytes}")
        try:
            return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample(f"text: no valid UTF-8 at byte {error.start}") from error

    def owns(self, value: Any) -> bool:
        return isinstance(value, (str, bytes, bytearray)) and (
            getattr(value, "kind", self.kind) == self.kind  # of `FileBytes`
        )

    def describe(self, value: str | bytes) -> str:
        if not isinstance(value, str):
            return f"{len(value)} bytes: {bytes(value[:PREVIEW])!r}"
        short = value[:PREVIEW].replace("\n", "\\n")
        return f"{len(value)} characters: {short}{'…' if len(value) > PREVIEW else ''}"

    def accept(self, value: Any) -> str | bytes:
        return super().accept(bytes(value) if isinstance(value, (bytearray, memoryview)) else value)

    def save(self, value: str | bytes, path: Path) -> None:
        path.write_bytes(value.encode() if isinstance(value, str) else value)

    def n_bytes(self, value: str | bytes, tokenizer: Any = None) -> int:
        return len(value.encode() if isinstance(value, str) else value)
