"""A folder, or a tar of plain files: files that differ only in their extension are one sample."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from mm.data.modalities.base import BadSample, either, one_line, table
from mm.data.shards import index
from mm.data.shards.members import split_ordinal
from mm.data.sources.base import (
    PICKLES,
    InlineBytes,
    Record,
    Source,
    SourceConfig,
    Unreadable,
    is_unicode,
    read_inside,
    readable,
    split_of,
)
from mm.errors import UserError
from mm.reading import parse_json
from mm.registry import SOURCES

_HASH_UP_TO = (
    256_000_000  # bytes of a folder that are hashed by content; above, size and time must do
)

REFUSED, SKIPPED = "refused\0", "skipped\0"  # no file can be called so: what is not read, and why


class File(NamedTuple):
    """One file below the root: POSIX path and how to read it."""

    path: str
    size: int
    stamp: int
    read: Callable[[], bytes]


@SOURCES.register("folder")
class FolderConfig(SourceConfig):
    """`cat.jpg`, `cat.txt` and `cat.json` (metadata) are one sample.

    A component `train`, `val` or `test` is its split.
    """

    kind: Literal["folder"] = "folder"
    caption_from: Annotated[
        Literal["parent"] | None,
        Field(description="text = name of the folder that the file lies in"),
    ] = None
    caption_regex: Annotated[
        str | None,
        Field(
            description="text = group `text` (or the first) in the file's name; other groups: "
            "metadata"
        ),
    ] = None
    caption_map: Annotated[
        dict[str, str], Field(description='then replaces the text, such as {"0": "zero"}')
    ] = {}
    incomplete: Annotated[
        Literal["reject", "keep"],
        Field(description="a caption without its image, where the other samples have both"),
    ] = "reject"
    follow_links: Annotated[
        bool, Field(description="read what links to files and folders elsewhere lead to")
    ] = False
    segments: Annotated[
        bool,
        Field(description="cat.000.txt, cat.001.png, ... are the segments of one sample"),
    ] = False

    @model_validator(mode="after")
    def _no_caption(self) -> FolderConfig:
        if self.segments and (self.caption_from or self.caption_regex):
            raise ValueError("segments: an interleaved sample has its text in it; drop caption_*")
        return self

    @field_validator("caption_map", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return (
            {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else value
        )  # YAML reads 0: as int

    @field_validator("caption_regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"caption_regex '{value}': {error}") from error
            if not groups:
                raise ValueError(f"caption_regex '{value}' has no group: write (?P<text>...)")
        return value

    @classmethod
    def smallest(cls) -> FolderConfig:
        return cls(path=Path("folder"))

    def build(self) -> FolderSource:
        return FolderSource(self)


class FolderSource(Source):
    """See `FolderConfig`."""

    def __init__(self, config: FolderConfig):
        self.config = config
        self._groups: dict[str, dict[str, list[File]]] | None = None
        self.ignored = {}

    def count(self) -> int:
        return len(self.groups())

    def groups(self) -> dict[str, dict[str, list[File]]]:
        """Stem -> extension -> files, sorted; only stems with at least one file that counts."""
        if self._groups is None:
            found: dict[str, dict[str, list[File]]] = {}
            ignored: Counter[str] = Counter()
            known = {*table().extensions, *PICKLES, "json"}
            for file in sorted(self._files(), key=lambda f: f.path):
                if not is_unicode(file.path):
                    name = readable(file.path)
                    found[f"{name}.{REFUSED}"] = {
                        REFUSED: [_refused(name, "its name is no valid UTF-8; rename it")]
                    }
                    continue
                stem, extension = _split(file.path)
                if extension == REFUSED:  # keeps its name, so that it joins no sample
                    found[file.path] = {REFUSED: [file]}
                elif extension == SKIPPED:
                    ignored[f"({stem})"] += 1
                elif extension in known:
                    numbered = self.config.segments and re.fullmatch(r"(.+)\.(\d{3})", stem)
                    if numbered and extension != "json":
                        stem, extension = numbered[1], f"{numbered[2]}.{extension}"
                    found.setdefault(stem, {}).setdefault(extension, []).append(file)
                else:
                    ignored[extension or "(none)"] += 1
            self.ignored = dict(ignored)
            self._groups = {s: g for s, g in found.items() if set(g) - {"json"}}
            if not self._groups:
                seen = (
                    "; it has: "
                    + ", ".join(
                        f"{n} x {'' if e.startswith('(') else '.'}{e}"
                        for e, n in ignored.most_common(5)
                    )
                    if ignored
                    else " (it is empty)"
                )
                raise UserError(f"{self.config.path}: no {either()} file{seen}")
        return self._groups

    def fingerprint(self) -> str:
        files = [f for group in self.groups().values() for same in group.values() for f in same]
        small = sum(f.size for f in files) <= _HASH_UP_TO
        digest = hashlib.sha256()
        for f in files:
            digest.update(f"{f.path}\0{f.size}\0".encode("utf-8", "surrogateescape"))
            try:
                digest.update(hashlib.sha256(f.read()).digest() if small else str(f.stamp).encode())
            except BadSample:
                digest.update(b"unreadable")
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Record]:
        groups = self.groups()
        usual = self._usual(groups)
        for stem, group in groups.items():
            yield self._record(stem, group, usual)

    def _files(self) -> Iterator[File]:
        root = self.config.path
        if root.is_file():
            for m in index.tar_entries(root):
                parts = [part for part in m.name.split("/") if part not in (".", "")]
                if any(part.startswith(".") for part in parts):
                    yield _skipped("hidden")
                    continue
                read = partial(_read_entry, root, m.offset, m.size)
                yield File(m.name.removeprefix("./"), m.size, 0, read)
            return
        yield from walk(root, self.config.follow_links)

    def _usual(self, groups: dict[str, dict[str, list[File]]]) -> frozenset[str]:
        """The modalities that most samples have, if samples of fewer are to be rejected."""
        if self.config.incomplete == "keep":
            return frozenset()
        of = table().extensions
        kinds = Counter(
            frozenset(of[e] for e in g if e in of) for g in groups.values() if REFUSED not in g
        )
        return kinds.most_common(1)[0][0] if kinds else frozenset()

    def _record(self, stem: str, group: dict[str, list[File]], usual: frozenset[str]) -> Record:
        if REFUSED in group:
            name = stem.removesuffix(f".{REFUSED}")
            return Record(name, f"{self.config.path.name}/{name}", {}, bad=_why(group[REFUSED][0]))
        path = PurePosixPath(stem)
        split = split_of(path.parts[:-1])
        names = ",".join(sorted(group))
        where = f"{self.config.path.name}/{stem}.{names if len(group) == 1 else '{' + names + '}'}"
        values: dict[str, Callable[[], bytes]] = {}
        meta: dict[str, Any] = {}

        def bad(reason: str) -> Record:
            return Record(stem, where, {}, split, meta, reason)

        extensions = table().extensions
        for name, files in group.items():
            ordinal, extension = split_ordinal(name)
            if extension in PICKLES:
                return bad(f"'.{extension}' files can run code when they are read: refused")
            if extension == "json":
                try:
                    meta |= read_metadata(files[0].read())
                except BadSample as error:
                    return bad(str(error))
                continue
            modality = extensions[extension]
            if ordinal and any(split_ordinal(member)[0] == ordinal for member in values):
                return bad(f"two files of segment {int(ordinal[:3])}")
            if modality in values or len(files) > 1:
                same = [f for e, fs in group.items() if extensions.get(e) == modality for f in fs]
                names = " and ".join(f"'{PurePosixPath(f.path).name}'" for f in same)
                return bad(f"two {modality} files of one name: {names}; rename one")
            if values and bool(ordinal) != bool(split_ordinal(next(iter(values)))[0]):
                return bad(f"'{name}' stands beside files with other names than segments have")
            values[ordinal + modality] = files[0].read
        if set(values) < usual:
            return bad(
                f"incomplete: has {'+'.join(sorted(values))}, the other samples have "
                f"{'+'.join(sorted(usual))}"
            )
        try:
            label = self._caption(path, meta)
        except BadSample as error:
            return bad(str(error))
        if label is not None:
            meta.setdefault("label", label)
            values.setdefault("text", InlineBytes(label.encode("utf-8", "surrogateescape")))
        return Record(stem, where, values, split, meta)

    def _caption(self, path: PurePosixPath, meta: dict[str, Any]) -> str | None:
        label = None
        if self.config.caption_regex is not None:
            match = re.search(self.config.caption_regex, path.name)
            if match is None:
                raise BadSample(
                    f"'{path.name}' does not match caption_regex {self.config.caption_regex}"
                )
            named = match.groupdict()
            label = named.pop("text", None) or match.group(1)
            meta |= {k: v for k, v in named.items() if v is not None}
        elif self.config.caption_from == "parent":
            label = path.parent.name.replace("_", " ")
            if not label:
                raise BadSample("lies in no sub-folder that could name it")
        if label is not None and self.config.caption_map:
            if label not in self.config.caption_map:
                raise BadSample(
                    f"caption '{label}' is not in caption_map: {', '.join(self.config.caption_map)}"
                )
            label = self.config.caption_map[label]
        return label


def walk(root: Path, follow_links: bool) -> Iterator[File]:
    """Every file below a folder; what is not read is there by its name and the reason.

    A link to a file or folder elsewhere, to nothing, or back to a folder that it lies in, and a
    folder that cannot be read, are refused; what is hidden, special, or a link to a folder that is
    read where it lies, is skipped and counted.
    """

    def below(folder: Path, above: frozenset[Path]) -> Iterator[File]:
        at = lambda entry: Path(entry).relative_to(root).as_posix()
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            yield _refused(at(folder), f"a folder that cannot be read: {error.strerror}")
            return
        for entry in entries:
            if entry.name.startswith("."):
                yield _skipped("hidden")
                continue
            path, inside = Path(entry.path), True
            if entry.is_symlink():
                try:
                    target = path.resolve()
                except (OSError, RuntimeError):
                    yield _refused(at(path), "a link that leads to itself")
                    continue
                inside = target.is_relative_to(root.resolve())
                if not target.exists():
                    yield _refused(at(path), "a link to nothing")
                    continue
                if not inside and not follow_links:
                    yield _refused(
                        at(path),
                        "a link that leads out of the folder: refused; read it with --follow-links",
                    )
                    continue
                if entry.is_dir() and target in above:
                    yield _refused(at(path), "a link back to a folder that it lies in")
                    continue
                if entry.is_dir() and inside:
                    yield _skipped("link to a folder that is read where it lies")
                    continue
            if entry.is_dir():
                yield from below(path, above | {path.resolve()})
            elif entry.is_file():
                stat, relative = entry.stat(), at(path)
                read = partial(read_inside, root, relative, follow_links)
                yield File(relative, stat.st_size, stat.st_mtime_ns, read)
            else:
                yield _skipped("neither a file nor a folder")

    yield from below(root, frozenset({root.resolve()}))


def _refused(path: str, reason: str) -> File:
    return File(f"{path}.{REFUSED}", 0, 0, Unreadable(reason))


def _why(file: File) -> str:
    try:
        file.read()
    except BadSample as error:
        return str(error)
    raise AssertionError(f"{file.path} was to be refused")


def _skipped(what: str) -> File:
    return File(f"{what}.{SKIPPED}", 0, 0, Unreadable(what))


def _split(path: str) -> tuple[str, str]:
    stem, dot, extension = path.rpartition(".")
    return (stem, extension.lower()) if dot and "/" not in extension else (path, "")


def _read_entry(tar: Path, offset: int, size: int) -> bytes:
    with open(tar, "rb") as file:
        file.seek(offset)
        return file.read(size)


def metadata(values: dict[str, Any]) -> bytes:
    """JSON of a sample's metadata, in a fixed order."""
    return json.dumps(values, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogateescape")


def read_metadata(data: bytes) -> dict[str, Any]:
    """Decode a metadata member. Raises BadSample."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise BadSample(f"json: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise BadSample("json: the metadata member must be an object")
    return value
