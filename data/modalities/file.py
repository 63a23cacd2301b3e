"""Files of any kind: their bytes, which nothing decodes. A tokenizer `bytes` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mm.data.modalities.base import BadSample, Modality, Shown
from mm.specs import FileBytes

PREVIEW = 16  # bytes


class FileModality(Modality):
    """Base of formats that nothing here decodes, such as MIDI: `FileBytes`. Length: bytes.

    A subclass is registered with its ``kind`` and its ``extensions``; ``tokens`` may give a colour.
    """

    max_file_bytes: Annotated[int, Field(gt=0, description="a larger file is no sample")] = (
        16_000_000
    )

    order: ClassVar[int] = 30
    value_name: ClassVar[str] = "FileBytes"
    any_ending: ClassVar[bool] = True

    def decode(self, data: bytes) -> FileBytes:
        if not 0 < len(data) <= self.max_file_bytes:
            raise BadSample(f"{self.kind}: {len(data)} bytes, not 1 to {self.max_file_bytes}")
        return FileBytes(data, self.kind)

    def accept(self, value: Any) -> FileBytes:
        is_bytes = isinstance(value, (bytes, bytearray, memoryview))
        return super().accept(self.decode(bytes(value)) if is_bytes else value)

    def owns(self, value: Any) -> bool:
        return isinstance(value, FileBytes) and value.kind == self.kind

    def describe(self, value: bytes) -> str:
        more = " ..." if len(value) > PREVIEW else ""
        return f"{len(value)} bytes: {value[:PREVIEW].hex(' ')}{more}"

    def save(self, value: bytes, path: Path) -> None:
        path.write_bytes(value)

    def n_bytes(self, value: bytes, tokenizer: Any = None) -> int:
        return len(value)

    def show(self, data: bytes) -> Shown:
        return Shown("text", self.describe(data))
