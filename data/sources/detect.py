"""Find out what a path is, and build the source that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.config import validate
from mm.data.chat.conversation import guess_map
from mm.data.modalities.base import table
from mm.data.shards.manifest import MANIFEST
from mm.data.sources.base import SEGMENTS, Source
from mm.data.sources.chat import head, tables
from mm.data.sources.hf import is_saved_dataset
from mm.errors import UserError
from mm.registry import SOURCES

TABLES = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
TEXTS = (".txt", ".text", ".md")


def open_source(
    src: Path, kind: str | None, given: Mapping[str, Any], val_share: float = 0.0
) -> Source:
    """Find out what ``src`` is and build its `Source`.

    Raises UserError when it is nothing that can be packed.
    """
    if not src.exists():
        raise UserError(f"no such file or folder: {src}")
    path = src
    if kind is None:
        if src.is_dir():
            manifests = [
                src / f"{name}{suffix}"
                for name in ("manifest", "metadata")
                for suffix in TABLES
                if suffix != ".json"  # what others call their settings, and this project its shards
            ]
            manifest = next((m for m in manifests if m.is_file()), None)
            if is_saved_dataset(src):
                kind = "hf"
            elif (src / MANIFEST).is_file() or _only_tars(src):
                kind = "shards"
            elif manifest is not None:
                kind, path = TABLES[manifest.suffix], manifest
            else:
                kind = "folder"
        elif src.suffix.lower() in TABLES:
            kind = TABLES[src.suffix.lower()]
        elif src.suffix.lower() == ".tar":
            kind = "folder"
        elif src.suffix.lower() in TEXTS:
            kind = "text"
        else:
            raise UserError(
                f"{src}: '{src.suffix}' is no source; give a folder, .tar, .jsonl, .csv, .parquet "
                "or .txt, or say which with --source"
            )
    values = {k: v for k, v in given.items() if v is not None}
    if holds_chat(path, kind, values):
        kind, values["table"] = "chat", kind
    elif kind == "chat":
        values["table"] = "hf" if path.is_dir() else TABLES.get(path.suffix.lower())
    cls = SOURCES.get(kind)
    flags = {k: "--" + k.replace("_", "-").replace("columns", "column") for k in values}
    wrong = [flags[k] for k in values if k not in cls.model_fields]
    if wrong:
        raise UserError(f"{src}: {', '.join(wrong)} means nothing for a source of kind '{kind}'")
    if kind == "text" and val_share:
        values["val_share"] = val_share
    config = validate(
        cls,
        {"kind": kind, "path": path, **values} if "kind" in cls.model_fields else values,
        str(src),
    )
    return config.build()


def holds_chat(path: Path, kind: str, given: Mapping[str, Any]) -> bool:
    """True for a table of conversations, by its map or its first rows.

    Columns of turns say so at once; questions and answers only where no column is a modality.
    """
    if kind not in {*TABLES.values(), "hf"} or given.keys() & {"columns", "tokenized"}:
        return False
    if "map" in given:
        return True
    first = tables(path, kind)[0][0]
    names = first.names()
    found = guess_map(names, head(first))
    if found is None:
        return False
    usual = {*table().modalities, SEGMENTS}
    return "messages" in found or not usual & set(names)


def _only_tars(folder: Path) -> bool:
    """True for a folder of foreign shards: tars and nothing else that could be data."""
    suffixes = {
        p.suffix.lower().lstrip(".")
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }
    return "tar" in suffixes and not suffixes & set(table().extensions)
