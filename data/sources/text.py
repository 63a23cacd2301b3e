"""One big text file, cut into documents on paragraph borders.

Joined again they are the file, byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mm.data.shards.index import sha256
from mm.data.sources.base import InlineBytes, Record, Source, SourceConfig
from mm.errors import UserError
from mm.registry import SOURCES


@SOURCES.register("text")
class TextConfig(SourceConfig):
    """Documents of at most ``document_bytes``.

    The last ``val_share`` of the file is the split "val".
    """

    kind: Literal["text"] = "text"
    document_bytes: Annotated[int, Field(ge=16)] = 2000
    val_share: Annotated[
        float, Field(ge=0, lt=1, description="the file's end, so that no neighbours are shared")
    ] = 0.0
    test_share: Annotated[float, Field(ge=0, lt=1, description="before it")] = 0.0

    @classmethod
    def smallest(cls) -> TextConfig:
        return cls(path=Path("book.txt"))

    def build(self) -> TextSource:
        return TextSource(self)


class TextSource(Source):
    """See `TextConfig`."""

    splits_itself = True

    def __init__(self, config: TextConfig):
        self.config = config
        self.size = config.path.stat().st_size
        if not self.size:
            raise UserError(f"{config.path}: empty file")

    def count(self) -> int:
        return max(1, round(1.1 * self.size / self.config.document_bytes))

    def fingerprint(self) -> str:
        return sha256(self.config.path)

    def __iter__(self) -> Iterator[Record]:
        borders = (1 - self.config.val_share - self.config.test_share, 1 - self.config.val_share)
        with open(self.config.path, "rb") as file:
            at = 0
            for piece in split_documents(
                iter(lambda: file.read(1 << 20), b""), self.config.document_bytes
            ):
                share = at / self.size
                split = "train" if share < borders[0] else "test" if share < borders[1] else "val"
                key = f"{self.config.path.stem}-{at:012d}"
                yield Record(
                    key, f"{self.config.path.name}@{at}", {"text": InlineBytes(piece)}, split
                )
                at += len(piece)


def split_documents(blocks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Cut a stream of bytes into pieces of at most ``limit``; joined they are the input.

    A cut comes after a blank line, else a line, else a blank, else anywhere between two UTF-8
    characters.
    """
    rest, ended = b"", False
    while rest or not ended:
        while len(rest) <= limit and not ended:
            block = next(blocks, b"")
            ended = not block
            rest += block
        if len(rest) <= limit:
            if rest:
                yield rest
            return
        start = 0
        while len(rest) - start > limit:
            stop = _border(rest[start : start + limit])
            yield rest[start : start + stop]
            start += stop
        rest = rest[start:]


def _border(piece: bytes) -> int:
    for mark in (b"\n\n", b"\r\n\r\n", b"\n", b" "):
        at = piece.rfind(mark)
        if at >= 0:
            return at + len(mark)
    stop = len(piece)
    while stop > 1 and piece[stop - 1] & 0xC0 == 0x80:  # do not part the bytes of one character
        stop -= 1
    if stop > 1 and piece[stop - 1] >= 0xC0:
        stop -= 1
    return stop
