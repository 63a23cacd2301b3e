"""The manifest of packed shards, typed: what stands in manifest.json is checked when it is read.

Sizes and sums must agree, and every name that becomes a path is one plain name.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import TypedDict

from mm.data.shards.remote import is_url, join, read_small
from mm.errors import UserError
from mm.names import PlainName
from mm.reading import parse_json
from mm.specs import MODALITY

FORMAT, VERSION = "mm-shards", 1
MANIFEST = "manifest.json"

Count = Annotated[int, Field(ge=0, lt=2**62, strict=True)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Modality = Annotated[str, Field(pattern=rf"^{MODALITY}$")]


class Entry(BaseModel):
    """A part of the manifest; keys of later versions are let through."""

    model_config = ConfigDict(extra="allow", frozen=True)


class ShardEntry(TypedDict):
    """One tar. A dict: there may be a hundred thousand, and objects take twice the time."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    name: PlainName
    samples: Count
    bytes: Count
    sha256: Hash


class IndexEntry(Entry):
    """The index of a split."""

    name: PlainName
    sha256: Hash
    bytes: Count | None = None


class LengthsEntry(Entry):
    """Lengths of one modality in a split."""

    count: Count
    total: Count
    min: Count
    max: Count


class SplitEntry(Entry):
    """One split: its shards add up to it."""

    samples: Count
    bytes: Count
    shards: tuple[ShardEntry, ...]
    index: IndexEntry
    lengths: dict[Modality, LengthsEntry]

    @model_validator(mode="after")
    def _adds_up(self) -> SplitEntry:
        for what in ("samples", "bytes"):
            total = sum(shard[what] for shard in self.shards)
            if total != getattr(self, what):
                raise ValueError(f"{what} {getattr(self, what)}, its shards have {total}")
        (name, times), *_ = Counter(shard["name"] for shard in self.shards).most_common(1) or [
            ("", 0)
        ]
        if times > 1:
            raise ValueError(f"shard '{name}' is listed twice")
        return self


class VocabularyEntry(Entry):
    """The vocabulary of token shards."""

    fingerprint: Hash
    size: Count


class ChatSettings(TypedDict):
    """How conversations were packed."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    loss: str


class PackSettings(TypedDict, total=False):
    """What the data were packed with, as far as training asks."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    chat: ChatSettings


class Manifest(Entry):
    """manifest.json."""

    format: Literal["mm-shards"]
    version: Annotated[int, Field(ge=1, le=VERSION, strict=True)]
    kind: Literal["raw", "tokens"]
    modalities: tuple[Modality, ...]
    source: str
    license: str
    quarantined: Count
    splits: Annotated[dict[PlainName, SplitEntry], Field(min_length=1)]
    vocabulary: VocabularyEntry | None = None
    settings: PackSettings = Field(default_factory=PackSettings)

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        found = {m for split in self.splits.values() for m in split.lengths}
        if found != set(self.modalities):
            raise ValueError(
                f"modalities {sorted(self.modalities)}, its splits hold {sorted(found)}"
            )
        if self.kind == "tokens" and self.vocabulary is None:
            raise ValueError("token shards without a vocabulary")
        return self


def parse_manifest(path: str | Path, data: bytes) -> dict[str, Any]:
    """Read the text of a manifest.

    Raises UserError naming the first key that is wrong.
    """
    try:
        raw = parse_json(data)
        Manifest.model_validate(raw)
        return raw
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        why = f"{where}: {first['msg'].removeprefix('Value error, ')}"
    except ValueError as error:
        why = str(error)
    raise UserError(
        f"{path}: not a shard manifest of this version ({why}); pack again with: mm data pack "
        "SRC --out DIR --overwrite"
    )


def read_manifest(root: str | Path) -> dict[str, Any]:
    """Read ``root/manifest.json``.

    Raises UserError with the mending command when there is none or it is no manifest.
    """
    if is_url(root):
        return parse_manifest(join(str(root), MANIFEST), read_small(join(str(root), MANIFEST)))
    root = Path(root)
    path = root / MANIFEST
    if not path.is_file():
        if not root.is_dir():
            raise UserError(
                f"no packed data at {root}; make it with: mm data pack SRC --out {root}"
            )
        foreign = " (there are tar files: foreign shards)" if any(root.rglob("*.tar")) else ""
        raise UserError(
            f"{root}: no {MANIFEST}{foreign}; pack it with: mm data pack {root} --out "
            f"{root.name}-packed"
        )
    return parse_manifest(path, path.read_bytes())


def split_samples(root: str | Path, split: str) -> int:
    """Samples of one split of packed data; 0 when there is none of that name."""
    return int(read_manifest(root)["splits"].get(split, {}).get("samples", 0))
