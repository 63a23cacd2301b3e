"""Source: where raw samples come from, before anything is decoded."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.data.modalities.base import BadSample, either, get_modality, table
from mm.data.shards.members import MAX_SEGMENTS, member_name
from mm.errors import UserError, did_you_mean

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
SAFE_SPLIT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
# Formats that run code when they are read. Their presence beside data is worth a word, not just a
# skip.
PICKLES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill"})


SEGMENTS = "segments"  # the column of interleaved samples
IDS = ("input_ids", "token_ids", "tokens", "ids")  # what a column of token ids is called elsewhere


class Record(NamedTuple):
    """One sample as found.

    ``values``: member (a modality; of an interleaved sample see `mm.data.shards.members`) -> a
    function that reads its bytes (it may raise BadSample).
    """

    key: str
    where: str  # file and line or offset, for the quarantine
    values: Mapping[str, Callable[[], bytes]]
    split: str | None = None
    meta: Mapping[str, Any] = {}
    bad: str = ""  # why it cannot be used; the values are then not read


class Source(ABC):
    """Plug point: iterates over records in a fixed order.

    Built by a config that has at least ``path``.
    """

    ignored: dict[str, int] = {}  # extension -> number of files that no modality claims
    splits_itself: bool = False  # the source has its own rule for `val_share`

    @abstractmethod
    def __iter__(self) -> Iterator[Record]:
        """Every record, readable or not."""

    def count(self) -> int | None:
        """Number of records, for progress bars; None = unknown."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the content does."""


class SourceConfig(Config):
    """What every source has."""

    path: Path

    def build(self) -> Source:
        raise NotImplementedError


class TableConfig(SourceConfig):
    """What every table (JSONL, CSV, Parquet) has."""

    columns: Annotated[
        dict[str, str],
        Field(
            description="modality -> column; default: the columns named as modalities, without any "
            "of them the column `segments`: a list of {modality: value}, an interleaved sample"
        ),
    ] = {}
    tokenized: Annotated[
        tuple[str, ...],
        Field(description="modalities; the columns then hold lists of token ids"),
    ] = ()
    root: Annotated[
        Path | None, Field(description="folder of relative paths; default that of the table")
    ] = None

    @classmethod
    def smallest(cls) -> TableConfig:
        return cls(path=Path("table"))


class TableSource(Source):
    """Rows of named columns.

    A value is inline text, a relative path, bytes, or {"path": ..} or {"bytes": ..}.
    """

    def __init__(self, config: TableConfig):
        self.path, self.root = config.path, config.root or config.path.parent
        self.columns, self.tokenized = dict(config.columns), config.tokenized
        self.known = frozenset(config.tokenized or table().modalities)

    @abstractmethod
    def names(self) -> list[str]:
        """Column names. Raises UserError on an unreadable or empty table."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """(where, row), or (where, reason) for a row that is unreadable."""

    def mapping(self) -> dict[str, str]:
        """Modality -> column. Raises UserError naming a missing column and those that there are."""
        names = self.names()
        have = ", ".join(names)
        for modality, column in self.columns.items():
            if modality not in (known := {*self.known, SEGMENTS}):
                raise UserError(
                    f"--column {modality}={column}: unknown modality{did_you_mean(modality, known)}"
                )
            if modality == SEGMENTS and len(self.columns) > 1:
                raise UserError(
                    f"--column {SEGMENTS}={column} holds whole samples; give no other column"
                )
            if column not in names:
                raise UserError(
                    f"{self.path}: no column '{column}' for modality '{modality}'; columns: {have}"
                )
        found = self.columns or {name: name for name in names if name in self.known}
        usual = [name for name in IDS if name in names]
        if not found and usual and len(self.tokenized) == 1:
            found = {self.tokenized[0]: usual[0]}
        if not found and SEGMENTS in names:
            found = {SEGMENTS: SEGMENTS}
        if not found:
            raise UserError(
                f"{self.path}: no column called {self._usual()}; columns: {have}; map one: "
                f"--column image={names[0]}, or a list of segments: --column segments={names[0]}"
            )
        return dict(found)

    def _usual(self) -> str:
        return ", ".join((*self.tokenized, *IDS)) if self.tokenized else either()

    def __iter__(self) -> Iterator[Record]:
        mapping = self.mapping()
        used = {*mapping.values(), "key", "split"}
        for number, (where, row) in enumerate(self.rows()):
            if isinstance(row, str):
                yield Record(f"{self.path.stem}-{number:08d}", where, {}, bad=row)
                continue
            given = row.get("key")
            key = str(given) if given not in (None, "") else f"{self.path.stem}-{number:08d}"
            split = row.get("split")
            bad = ""
            if not is_unicode(key):
                why = "its key is no valid Unicode: lone surrogates"
                yield Record(readable(key), where, {}, bad=why)
                continue
            try:
                values = {member: self._reader(m, v) for member, m, v in self._found(row, mapping)}
            except BadSample as error:
                values, bad = {}, str(error)
            meta = {k: v for k, v in row.items() if k not in used and _plain(v)}
            bad = bad or ("" if values else f"no value in {', '.join(mapping.values())}")
            yield Record(key, where, values, None if split in (None, "") else str(split), meta, bad)

    def fingerprint(self) -> str:
        """Hash of the table, and of size and time of every file that it names."""
        digest = hashlib.sha256(self.path.read_bytes())
        mapping = self.mapping()
        for _, row in self.rows():
            try:
                found = self._found(row, mapping) if isinstance(row, dict) else []
            except BadSample:
                continue  # it has no files that are read
            for _, modality, value in found:
                path = value.get("path") if isinstance(value, dict) else value
                if not isinstance(value, dict) and self._inline(modality):
                    continue
                if not isinstance(path, str):
                    continue
                try:
                    stat = (self.root / path).stat()
                except (OSError, ValueError):
                    continue  # nor this
                if not S_ISREG(stat.st_mode):
                    continue
                digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return digest.hexdigest()

    def _found(
        self, row: Mapping[str, Any], mapping: Mapping[str, str]
    ) -> list[tuple[str, str, Any]]:
        """(member, modality, value) of everything in a row. Raises BadSample on bad segments."""
        if SEGMENTS in mapping:
            return parse_segments(row.get(mapping[SEGMENTS]), self.known)
        return [
            (m, m, row[c]) for m, c in mapping.items() if row.get(c) is not None and row[c] != ""
        ]

    def _inline(self, kind: str) -> bool:
        """True where a value is no path: text, and token ids."""
        return bool(self.tokenized) or get_modality(kind).is_text

    def _reader(self, kind: str, value: Any) -> Callable[[], bytes]:
        if self.tokenized:
            return token_reader(kind, value)
        if isinstance(value, dict):
            if value.get("bytes") is not None:
                value = value["bytes"]
            elif isinstance(value.get("path"), str):
                return partial(read_inside, self.root, value["path"])
            else:
                return Unreadable(f"{kind}: neither 'path' nor 'bytes' in {sorted(value)}")
        if isinstance(value, (bytes, bytearray)):
            return InlineBytes(bytes(value))
        inline = self._inline(kind)
        if not isinstance(value, str):
            return Unreadable(
                f"{kind}: expected {'text' if inline else 'a path'}, found {type(value).__name__}"
            )
        if inline:
            try:
                return InlineBytes(value.encode())
            except UnicodeEncodeError:
                return Unreadable(f"{kind}: lone surrogates are no valid Unicode")
        return partial(read_inside, self.root, value)


def token_reader(modality: str, value: Any) -> Callable[[], bytes]:
    """A reader of a list of ids: int32 codes, little-endian."""
    ids = value
    if isinstance(value, (list, tuple)):
        ids = np.asarray(value) if value else np.empty(0, np.int32)
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        return Unreadable(f"{modality}: expected a list of token ids, found {value!r:.60}")
    if len(ids) and (ids.min() < 0 or ids.max() >= 2**31):
        return Unreadable(f"{modality}: ids {ids.min()}..{ids.max()} are no token ids")
    return InlineBytes(ids.astype("<i4").tobytes())


def parse_segments(given: Any, known: Collection[str]) -> list[tuple[str, str, Any]]:
    """(member, modality, value) of each segment of a list of ``{modality: value}``.

    Keys without a value (as tables fill them in) do not count. Raises BadSample naming the segment.
    """
    if not isinstance(given, (list, tuple)) or not given:
        raise BadSample(f"segments: expected a list of {{modality: value}}, found {given!r:.60}")
    if len(given) > MAX_SEGMENTS:
        raise BadSample(f"segments: {len(given)} of them, the cap is {MAX_SEGMENTS}")
    out = []
    for number, each in enumerate(given):
        given_here = each.items() if isinstance(each, dict) else ()
        have = {k: v for k, v in given_here if v is not None and not _empty(v)}
        if len(have) != 1 or not have.keys() <= set(known):
            raise BadSample(
                f"segment {number}: expected one of {', '.join(sorted(known))} with a value, "
                f"found {', '.join(map(str, have)) or repr(each)[:60]}"
            )
        ((modality, value),) = have.items()
        out.append((member_name(number, modality), modality, value))
    return out


def read_inside(root: Path, relative: str, follow_links: bool = False) -> bytes:
    """Read a file below ``root``.

    Raises BadSample when it is missing, or the path leads out of ``root`` and links are not
    followed.
    """
    path = root / relative
    try:
        if not follow_links and not path.resolve().is_relative_to(root.resolve()):
            raise BadSample(
                f"'{relative[:200]}' leads out of {root}; give the folder of the files with --root"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise BadSample(f"'{relative[:200]}': {reason}") from error


def is_unicode(text: str) -> bool:
    """False of a text with lone surrogates, as names of files and JSON may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(text: str) -> str:
    """The text with its lone surrogates written out."""
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class InlineBytes:
    """A reader of bytes that are here already.

    A reader that can be pickled is called in a worker process, another one in the main process.
    """

    data: bytes

    def __call__(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A reader that can only say why it cannot read."""

    reason: str

    def __call__(self) -> bytes:
        raise BadSample(self.reason)


def split_of(parts: Iterable[str]) -> str | None:
    """The split that a path component names: train, val or test; None without one."""
    return next((SPLITS[p.lower()] for p in parts if p.lower() in SPLITS), None)


def _empty(value: Any) -> bool:
    return isinstance(value, (str, bytes, list)) and not value


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 64 and all(map(_plain, value))
    if isinstance(value, dict):
        return len(value) <= 64 and all(isinstance(k, str) and _plain(v) for k, v in value.items())
    return value is None or isinstance(value, (str, int, float, bool))
