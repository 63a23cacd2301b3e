"""Describe packed shards: what is there, and what one sample looks like."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.modalities.base import get_modality, modality_of_value
from mm.data.pack.encode import open_tokenizers
from mm.data.shards.members import member_modality, members_of
from mm.data.shards.reader import VOCABULARY, ShardSet, read_manifest
from mm.specs import Encoded
from mm.vocabulary import Vocabulary


def inspect(
    root: str | Path,
    *,
    out: str | Path | None = None,
    tokenizers: str | Path | dict[str, Any] | None = None,
    split: str | None = None,
    sample: int = 0,
) -> dict[str, Any]:
    """Describe packed shards.

    Args:
        root: folder with manifest.json.
        out: folder that takes one decoded sample of each modality (PNG, WAV, TXT); None writes
            none.
        tokenizers: as for `pack`; needed to decode token shards.
        split: take the decoded sample from this one; default the first.
        sample: the decoded sample is the ``sample``-th that has the modality.
    Returns:
        JSON-able: kind, source, license, quarantined, splits (samples, shards, bytes, and of each
        modality count, total, min, mean, max and unit), vocabulary (ranges, fingerprints), examples
        (modality -> key, description, file).
    Raises:
        UserError: no packed data, no such split, or tokenizers of another vocabulary.
    """
    root = Path(root)
    manifest = read_manifest(root)
    tokenized = manifest["kind"] == "tokens"
    splits = {}
    for name, entry in manifest["splits"].items():
        splits[name] = {
            "samples": entry["samples"],
            "shards": len(entry["shards"]),
            "bytes": entry["bytes"],
            "modalities": {
                m: s
                | {
                    "mean": s["total"] / s["count"] if s["count"] else math.nan,
                    "unit": "tokens" if tokenized else get_modality(m).unit,
                }
                for m, s in entry["lengths"].items()
            },
        }
    result: dict[str, Any] = {
        "path": str(root),
        "kind": manifest["kind"],
        "source": manifest["source"],
        "license": manifest["license"],
        "modalities": manifest["modalities"],
        "quarantined": manifest["quarantined"],
        "splits": splits,
        "examples": {},
    }
    if tokenized:
        vocabulary = Vocabulary.load(root / VOCABULARY)
        result["vocabulary"] = {
            "size": vocabulary.size,
            "fingerprint": vocabulary.fingerprint,
            "ranges": {
                s.modality: {
                    "ids": list(vocabulary.range(s.modality)[1:]),
                    "codes": s.n_ids,
                    "fingerprint": s.fingerprint,
                }
                for s in vocabulary.ranges
            },
        }
    name = split or next(iter(manifest["splits"]))
    shards = ShardSet.open(root, name)
    opened = open_tokenizers(tokenizers) if tokenizers is not None and tokenized else {}
    if opened and shards.vocabulary:
        shards.vocabulary.require(
            [t.spec for t in opened.values() if t.spec.modality in shards.vocabulary.modalities],
            "tokenizers",
        )
    for modality in manifest["modalities"]:
        having = shards.having(modality)
        if not len(having):
            continue
        i = int(having[sample % len(having)])
        example: dict[str, Any] = {"key": shards.key(i), "metadata": shards.meta(i)}
        member = members_of(shards.members(i), modality)[0]
        if shards.interleaved:
            example["segments"] = segment_sizes(shards, i)
        if tokenized:
            code = shards.encoded(i)[member]
            example["tokens"] = code.ids[:16].tolist()
            if modality not in opened:
                result["examples"][modality] = example | {
                    "what": f"{len(code.ids)} tokens; decode them with --tokenizers DIR"
                }
                continue
            value = opened[modality].decode([Encoded(np.array(code.ids), side=code.side)])[0]
        else:
            value = shards.value(i, member)
        own = modality_of_value(value)
        example["what"] = own.describe(value)
        if out is not None:
            file = Path(out) / f"{modality}-{name}-{i:06d}.{own.extensions[0]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            own.save(value, file)
            example["file"] = str(file)
        result["examples"][modality] = example
    shards.close()
    return result


def segment_sizes(shards: ShardSet, i: int) -> str:
    """What an interleaved sample is made of: ``text 12, image 64, text 3``; tokens, else bytes."""
    if shards.tokenized:
        sizes = {member: len(ids) for member, ids in shards.tokens(i).items()}
    else:
        sizes = {member: int(shards.index.size[e]) for member, e in shards.members(i).items()}
    return ", ".join(f"{member_modality(member)} {n}" for member, n in sizes.items())
