"""Conversations in a table: each row rendered by a chat template, its media beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mm.config import validate
from mm.data.chat.conversation import LOOKED_AT, Media, check_map, guess_map, read_row
from mm.data.chat.encode import text_bytes
from mm.data.chat.sandbox import TemplateError
from mm.data.chat.template import ChatTemplate, MediaPart, TextPart
from mm.data.modalities.base import BadSample
from mm.data.shards.members import MAX_SEGMENTS, member_name
from mm.data.sources.base import (
    InlineBytes,
    Record,
    Source,
    SourceConfig,
    TableConfig,
    TableSource,
    is_unicode,
    read_inside,
    readable,
)
from mm.data.sources.hf import HfSource
from mm.errors import UserError
from mm.registry import SOURCES


@SOURCES.register("chat")
class ChatConfig(SourceConfig):
    """Conversations of a JSONL, JSON, CSV or Parquet table, or of a Hugging Face data set.

    OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's `instruction`, `input` and `output`,
    or any columns that ``map`` names. Needs tokenizers: what a template writes depends on them.
    """

    kind: Literal["chat"] = "chat"
    table: Annotated[str | None, Field(description="kind of the table; default by its name")] = None
    map: Annotated[
        dict[str, str] | None,
        Field(description="messages, or user, assistant, system, input; image, ... -> column"),
    ] = None
    root: Annotated[
        Path | None, Field(description="folder of relative paths; default that of the table")
    ] = None

    @classmethod
    def smallest(cls) -> ChatConfig:
        return cls(path=Path("talks.jsonl"))

    def build(self) -> ChatSource:
        return ChatSource(self)


def tables(path: Path, kind: str) -> list[tuple[TableSource, str | None]]:
    """The tables of a source of conversations, each with its split.

    Raises UserError on a kind that is none.
    """
    cls = SOURCES.get(kind)
    if not issubclass(cls, TableConfig):
        raise UserError(f"{path}: a source of kind '{kind}' holds no conversations")
    built = validate(cls, {"path": path}, str(path)).build()
    if isinstance(built, HfSource):
        return [(part, part.split) for part in built.parts]
    assert isinstance(built, TableSource)
    return [(built, None)]


def head(table: TableSource) -> list[Mapping[str, Any]]:
    """The first rows that can be read."""
    return list(islice((row for _, row in table.rows() if isinstance(row, dict)), LOOKED_AT))


class ChatSource(Source):
    """See `ChatConfig`. ``template`` is set before it is iterated."""

    def __init__(self, config: ChatConfig):
        self.path = config.path
        self.parts = tables(config.path, config.table or "jsonl")
        first = self.parts[0][0]
        self.root = config.root
        names = first.names()
        if config.map is not None:
            self.mapping = check_map(config.map, names, str(config.path))
        else:
            found = guess_map(names, head(first))
            if found is None:
                raise UserError(
                    f"{config.path}: holds no conversation: neither a column of messages nor one "
                    f"of questions and one of answers; columns: {', '.join(names)}; map them: "
                    f"--map user={names[0]} --map assistant={names[-1]}"
                )
            self.mapping = found
        self.guessed = config.map is None
        self.template: ChatTemplate | None = None

    def count(self) -> int | None:
        counts = [table.count() for table, _ in self.parts]
        return None if None in counts else sum(n or 0 for n in counts)

    def fingerprint(self) -> str:
        """Of the tables, the map, and of size and time of every file that they name."""
        digest = hashlib.sha256(repr(sorted(self.mapping.items())).encode())
        for table, _ in self.parts:
            digest.update(content_of(table))
            for _, row in table.rows():
                try:
                    messages = read_row(row, self.mapping).messages if isinstance(row, dict) else ()
                except BadSample:
                    continue  # it has no files that are read
                for part in (p for m in messages for p in m.parts):
                    if isinstance(part, Media) and isinstance(part.value, str):
                        digest.update(_stat(self._root(table) / part.value))
        return digest.hexdigest()

    def _root(self, table: TableSource) -> Path:
        return self.root or table.root

    def __iter__(self) -> Iterator[Record]:
        for table, split in self.parts:
            for number, (where, row) in enumerate(table.rows()):
                record = self._record(table, number, where, row)
                if split is not None:
                    own = record.key.startswith(f"{table.path.stem}-")
                    key = f"{split}/{record.key}" if own else record.key
                    record = record._replace(key=key, split=record.split or split)
                yield record

    def _record(
        self, table: TableSource, number: int, where: str, row: dict[str, Any] | str
    ) -> Record:
        key = f"{table.path.stem}-{number:08d}"
        if isinstance(row, str):
            return Record(key, where, {}, bad=row)
        given = row.get("key", row.get("id"))
        if isinstance(given, (str, int)) and str(given):
            key = str(given)
        if not is_unicode(key):
            why = "its key is no valid Unicode: lone surrogates"
            return Record(readable(key), where, {}, bad=why)
        split = row.get("split")
        split = split if isinstance(split, str) and split else None
        assert self.template is not None, "a template is set before conversations are read"
        try:
            parts = self.template.parts(read_row(row, self.mapping))
            return Record(key, where, self._values(parts, self._root(table)), split)
        except BadSample as error:
            return Record(key, where, {}, split, bad=str(error))
        except TemplateError as error:
            raise UserError(
                f"sample '{key}' ({where}): the template {self.template.origin}: {error}; give "
                "another with --template FILE"
            ) from error
        except UnicodeEncodeError:
            return Record(key, where, {}, split, bad="text: lone surrogates are no valid Unicode")

    def _values(self, parts: Sequence[TextPart | MediaPart], root: Path) -> dict[str, Any]:
        if len(parts) > MAX_SEGMENTS:
            raise BadSample(f"{len(parts)} segments, the cap is {MAX_SEGMENTS}")
        kinds = ["text" if isinstance(p, TextPart) else p.media.modality for p in parts]
        names = kinds if kinds == ["text"] else [member_name(n, k) for n, k in enumerate(kinds)]
        learnt = [
            name
            for name, part in zip(names, parts, strict=True)
            if isinstance(part, MediaPart) and part.learnt
        ]
        return {
            name: InlineBytes(text_bytes(part, learnt))
            if isinstance(part, TextPart)
            else reader(part.media, root)
            for name, part in zip(names, parts, strict=True)
        }


def reader(media: Media, root: Path) -> Any:
    """A function that reads an item's bytes, in a worker process or here."""
    if isinstance(media.value, dict):
        return InlineBytes(bytes(media.value["bytes"]))
    return partial(read_inside, root, media.value)


def content_of(table: TableSource) -> bytes:
    """A hash of a table's own bytes."""
    if table.path.is_file():
        with table.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    return table.fingerprint().encode()


def _stat(path: Path) -> bytes:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return b"missing"
    return f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
