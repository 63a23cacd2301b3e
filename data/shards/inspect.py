"""Describe packed shards: what is there, and what one sample looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.modalities.base import get_modality, modality_of_value, raw_modality, show_file
from mm.data.shards.manifest import read_manifest
from mm.data.shards.members import member_modality, members_of
from mm.data.shards.reader import VOCABULARY, ShardSet
from mm.errors import UserError
from mm.specs import Encoded, ModalityTokenizer
from mm.tokenizers.load import load_tokenizers
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
        (modality -> key, description, file, a picture of numbers).
    Raises:
        UserError: no packed data, no such split, or tokenizers of another vocabulary.
    """
    root = Path(root)
    manifest = read_manifest(root)
    tokenized = manifest["kind"] == "tokens"
    result: dict[str, Any] = {
        "path": str(root),
        "kind": manifest["kind"],
        "source": manifest["source"],
        "license": manifest["license"],
        "modalities": manifest["modalities"],
        "quarantined": manifest["quarantined"],
        "splits": {name: _split(entry, tokenized) for name, entry in manifest["splits"].items()},
        "examples": {},
    }
    if tokenized:
        result["vocabulary"] = _vocabulary(Vocabulary.load(root / VOCABULARY))
    name = split or next(iter(manifest["splits"]))
    shards = ShardSet.open(root, name)
    opened = load_tokenizers(tokenizers) if tokenizers is not None and tokenized else {}
    if opened and shards.vocabulary:
        known = shards.vocabulary.modalities
        specs = [t.spec for t in opened.values() if t.spec.modality in known]
        shards.vocabulary.require(specs, "tokenizers")
    for modality in manifest["modalities"]:
        having = shards.having(modality)
        if len(having):
            i = int(having[sample % len(having)])
            file = Path(out) / f"{modality}-{name}-{i:06d}" if out is not None else None
            result["examples"][modality] = _example(shards, i, modality, opened, file)
    shards.close()
    return result


def _split(entry: Mapping[str, Any], tokenized: bool) -> dict[str, Any]:
    """What the manifest says of one split, with means and units."""
    modalities = {}
    for modality, s in entry["lengths"].items():
        modalities[modality] = s | {
            "mean": s["total"] / s["count"] if s["count"] else math.nan,
            "unit": "tokens" if tokenized else get_modality(modality).unit,
        }
    return {
        "samples": entry["samples"],
        "shards": len(entry["shards"]),
        "bytes": entry["bytes"],
        "modalities": modalities,
    }


def _vocabulary(vocabulary: Vocabulary) -> dict[str, Any]:
    ranges = {}
    for spec in vocabulary.ranges:
        ranges[spec.modality] = {
            "ids": list(vocabulary.range(spec.modality)[1:]),
            "codes": spec.n_ids,
            "fingerprint": spec.fingerprint,
        }
    return {"size": vocabulary.size, "fingerprint": vocabulary.fingerprint, "ranges": ranges}


def _example(
    shards: ShardSet,
    i: int,
    modality: str,
    tokenizers: Mapping[str, ModalityTokenizer],
    file: Path | None,
) -> dict[str, Any]:
    """One value of sample ``i``: described, and written to ``file`` with its suffix."""
    example: dict[str, Any] = {"key": shards.key(i), "metadata": shards.meta(i)}
    member = members_of(shards.members(i), modality)[0]
    if shards.interleaved:
        example["segments"] = segment_sizes(shards, i)
    if shards.tokenized:
        code = shards.read_encoded(i)[member]
        if code.values is not None:
            shape, kind = code.values.shape, code.values.dtype
            said = f"values {'x'.join(map(str, shape[:-1]))} of {shape[-1]} features, {kind}"
            return example | {"what": said}
        example["tokens"] = code.ids[:16].tolist()
        if modality not in tokenizers:
            said = f"{len(code.ids)} tokens; decode them with --tokenizers DIR"
            return example | {"what": said}
        value = tokenizers[modality].decode([Encoded(np.array(code.ids), side=code.side)])[0]
    else:
        value = shards.value(i, member)
    try:
        own = modality_of_value(value)
    except UserError:  # a tokenizer of someone else may decode to anything
        return example | {"what": f"a {type(value).__name__}"}
    if isinstance(value, bytes):
        own = raw_modality(modality)
    example["what"] = own.line(value)
    if file is not None:
        written = own.write(value, file)
        example["file"] = str(written)
        shown = show_file(written)
        if shown.kind == "image" and own.shown_as != "image":
            picture = written.with_suffix(f".{shown.ending}")
            picture.write_bytes(shown.content)
            example["picture"] = str(picture)
    return example


def segment_sizes(shards: ShardSet, i: int) -> str:
    """What an interleaved sample is made of: ``text 12, image 64, text 3``; tokens, else bytes."""
    if shards.tokenized:
        sizes = {
            member: len(found) if found.ndim == 1 else math.prod(found.shape[:-1])
            for member, found in shards.tokens(i).items()
        }
    else:
        sizes = {member: int(shards.index.size[e]) for member, e in shards.members(i).items()}
    return ", ".join(f"{member_modality(member)} {n}" for member, n in sizes.items())
