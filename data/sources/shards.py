"""Packed shards as a source, to tokenise or re-split them; or tars that another program made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mm.data.shards.index import sha256
from mm.data.shards.manifest import MANIFEST, read_manifest
from mm.data.shards.reader import ShardSet
from mm.data.sources.base import InlineBytes, Record, Source, SourceConfig, split_of
from mm.data.sources.folder import FolderConfig, FolderSource
from mm.errors import UserError
from mm.registry import SOURCES


@SOURCES.register("shards")
class ShardsConfig(SourceConfig):
    """A folder with a manifest, or one with WebDataset tars of plain files."""

    kind: Literal["shards"] = "shards"

    @classmethod
    def smallest(cls) -> ShardsConfig:
        return cls(path=Path("shards"))

    def build(self) -> Source:
        return (
            PackedShards(self.path)
            if (self.path / MANIFEST).is_file()
            else ForeignShards(self.path)
        )


class PackedShards(Source):
    """Every split of a folder that `pack` made."""

    def __init__(self, path: Path):
        self.path, self.manifest = path, read_manifest(path)
        if self.manifest["kind"] != "raw":
            raise UserError(
                f"{path}: token shards hold no raw values; give the raw shards that they were "
                "made from"
            )

    def count(self) -> int:
        return sum(entry["samples"] for entry in self.manifest["splits"].values())

    def fingerprint(self) -> str:
        return sha256(self.path / MANIFEST)

    def __iter__(self) -> Iterator[Record]:
        for split in self.manifest["splits"]:
            shards = ShardSet.open(self.path, split)
            for i in range(len(shards)):
                values = {}
                for member in shards.members(i):
                    found = shards.raw(i, member)
                    if found is not None:
                        values[member] = InlineBytes(found[1])
                yield Record(
                    shards.key(i), f"{split}:{shards.key(i)}", values, split, shards.meta(i)
                )
            shards.close()


class ForeignShards(Source):
    """Tars without a manifest: read like folders, checked like them."""

    def __init__(self, path: Path):
        tars = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
        if not tars:
            raise UserError(f"{path}: no {MANIFEST} and no .tar file")
        self.parts = [(tar, FolderSource(FolderConfig(path=tar))) for tar in tars]

    def count(self) -> int:
        return sum(source.count() for _, source in self.parts)

    def fingerprint(self) -> str:
        return " ".join(sha256(tar) for tar, _ in self.parts)

    def __iter__(self) -> Iterator[Record]:
        ignored: Counter[str] = Counter()
        for tar, source in self.parts:
            source.groups()
            ignored.update(source.ignored)
            self.ignored = dict(ignored)
            for record in source:
                # The split may stand in the tar's own path: train-000.tar, val/000.tar
                named = [p for p in (tar.parent.name, tar.stem.split("-")[0]) if p]
                yield record._replace(split=record.split or split_of(named))
