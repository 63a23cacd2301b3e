"""Whether every byte of packed shards is as it was packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mm.data.shards import index
from mm.data.shards.manifest import read_manifest
from mm.data.shards.members import member_modality
from mm.data.shards.reader import VOCABULARY, ShardSet
from mm.errors import UserError
from mm.vocabulary import Vocabulary


def verify(root: str | Path) -> dict[str, Any]:
    """Compare every file with the manifest.

    Returns:
        JSON-able: ok, shards, samples, bytes, and problems (one line each, naming the file).
    Raises:
        UserError: there is no manifest to compare with.
    """
    root = Path(root)
    manifest = read_manifest(root)
    problems: list[str] = []
    shards = samples = size = 0
    keys: dict[str, str] = {}
    for split, entry in manifest["splits"].items():
        count, before = 0, len(problems)
        for shard in entry["shards"]:
            path = root / split / shard["name"]
            shards += 1
            if not path.is_file():
                problems.append(f"{path}: missing")
                continue
            have = path.stat().st_size
            size += have
            if have != shard["bytes"]:
                problems.append(f"{path}: {have} bytes, the manifest says {shard['bytes']}")
            elif index.sha256(path) != shard["sha256"]:
                problems.append(
                    f"{path}: its SHA-256 is not that of the manifest: a byte was changed"
                )
            try:
                built = index.build([path])
            except UserError as error:
                problems.append(str(error))
                continue
            if len(built) != shard["samples"]:
                problems.append(
                    f"{path}: {len(built)} samples, the manifest says {shard['samples']}"
                )
            count += len(built)
            for i in range(len(built)):
                key = built.key(i)
                if key in keys:
                    problems.append(f"{path}: key '{key}' is also in {keys[key]}")
                keys[key] = f"{split}/{shard['name']}"
        if count != entry["samples"]:
            problems.append(
                f"{root / split}: {count} samples, the manifest says {entry['samples']}"
            )
        samples += count
        problems += _index_problems(root / split, entry, whole=len(problems) == before)
        listed = {shard["name"] for shard in entry["shards"]}
        problems += [
            f"{p}: not in the manifest"
            for p in sorted((root / split).glob("*.tar"))
            if p.name not in listed
        ]
    if manifest["kind"] == "tokens":
        try:
            vocabulary = Vocabulary.load(root / VOCABULARY)
            if vocabulary.fingerprint != manifest["vocabulary"]["fingerprint"]:
                problems.append(f"{root / VOCABULARY}: not the vocabulary of these shards")
            else:
                problems += _ids_in_range(root, manifest)
        except (UserError, ValueError) as error:
            problems.append(str(error))
    return {
        "path": str(root),
        "ok": not problems,
        "shards": shards,
        "samples": samples,
        "bytes": size,
        "problems": list(dict.fromkeys(problems)),
    }


def _index_problems(folder: Path, entry: dict[str, Any], whole: bool) -> list[str]:
    """What is wrong with the index of a split; compared with its shards where these are whole."""
    path = folder / entry["index"]["name"]
    if not path.is_file() or index.sha256(path) != entry["index"]["sha256"]:
        return [f"{path}: missing or changed (training rebuilds it in memory)"]
    shards = [folder / shard["name"] for shard in entry["shards"]]
    try:
        have = index.Index.load(path, len(shards))
    except UserError as error:
        return [f"{error}; delete it: it is made anew from the shards"]
    built = index.build(shards) if whole else have
    problems = [
        f"{path}: column {name} is not that of the shards; delete it: it is made anew from them"
        for name in have.differences(built)
    ]
    for modality, said in entry["lengths"].items():
        values = built.lengths.get(modality)
        real = [] if values is None else values[values >= 0]
        found = {"count": len(real), "total": int(sum(real))} if values is not None else {}
        for what, number in found.items():
            if said[what] != number:
                problems.append(f"{folder}: {modality} {what} is {number}, not {said[what]}")
    return problems


def _ids_in_range(root: Path, manifest: dict[str, Any]) -> list[str]:
    """Codes outside their tokenizer's range, sample by sample.

    They would be read as another modality.
    """
    problems = []
    for split in manifest["splits"]:
        try:
            shards = ShardSet.open(root, split)
        except UserError:
            continue  # reported already
        limits = {spec.modality: spec.n_ids for spec in shards.specs}
        for i in range(len(shards)):
            sample = f"{root / split}: sample '{shards.key(i)}'"
            try:
                found = shards.tokens(i)
            except UserError as error:
                problems.append(str(error))
                continue
            for member, ids in found.items():
                top = limits[member_modality(member)]
                if not top:  # values
                    if not np.isfinite(ids).all():
                        problems.append(f"{sample}: {member} has values that are not finite")
                elif len(ids) and (ids.min() < 0 or ids.max() >= top):
                    problems.append(f"{sample}: {member} ids outside 0..{top - 1}")
    return problems
