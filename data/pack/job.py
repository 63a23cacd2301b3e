"""Pack: any source to shards that training reads, raw or as tokens.

Atomic, repeatable, and nothing is lost silently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mm.data.modalities.decode import NATIVE, Limits
from mm.data.pack.encode import Encoder, open_tokenizers, vocabulary_of
from mm.data.pack.output import Run
from mm.data.pack.pool import batches
from mm.data.pack.pretokenized import TokenIds, token_specs
from mm.data.pack.worker import PreparedBatch, Work
from mm.data.pack.writer import atomic_folder, write_manifest
from mm.data.shards.reader import FORMAT, MANIFEST, VERSION, VOCABULARY, read_manifest
from mm.data.sources.base import SAFE_SPLIT, SEGMENTS, SPLITS
from mm.data.sources.detect import open_source
from mm.errors import UserError, did_you_mean
from mm.launch.environment import cores
from mm.vocabulary import Vocabulary, merged

log = logging.getLogger(__name__)
BATCH = 256  # samples encoded together
REASONS = 50  # that the manifest lists


@dataclass(frozen=True)
class PackReport:
    """What was packed. ``lengths``: modality -> total tokens, or bytes, pixels, audio frames."""

    out: Path
    kind: str  # "raw" or "tokens"
    samples: dict[str, int]  # by split
    modalities: dict[str, int]  # samples that have it
    lengths: dict[str, int]
    bytes: int
    quarantined: int
    seconds: float
    already: bool = False  # nothing was done: the same input and settings are packed there
    ignored: dict[str, int] = field(
        default_factory=dict
    )  # extension -> files that no modality claims
    left_out: tuple[str, ...] = ()  # raw modalities without a tokenizer
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> samples, commonest first
    duplicates: int = 0  # samples left out because an earlier one has the same content
    # split -> modality -> "64": samples of length 64..127
    histograms: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"out": str(self.out), "left_out": list(self.left_out)}


def pack(
    src: str | Path,
    out: str | Path,
    *,
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
    root: str | Path | None = None,
    tokenizers: str | Path | Mapping[str, Any] | None = None,
    vocabulary: str | Path | Vocabulary | None = None,
    split: str | None = None,
    val_share: float = 0.0,
    shard_mb: float = 64.0,
    max_bad: float = 0.01,
    overwrite: bool = False,
    caption_from: str | None = None,
    caption_regex: str | None = None,
    caption_map: Mapping[str, str] | None = None,
    incomplete: str | None = None,
    document_bytes: int | None = None,
    segments: bool = False,
    tokenized: bool = False,
    license: str = "",
    limits: Limits | None = None,
    dedupe: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> PackReport:
    """Pack ``src`` into the folder ``out``.

    A pack that was killed goes on where it was when the same call is made again; its bytes are
    those of a pack in one go.

    Args:
        src: a folder or tar of files paired by stem, a JSONL, CSV, TSV or Parquet manifest, one
            text file, a folder with manifest.jsonl, or packed shards.
        out: new folder: manifest.json and <split>/shard-000000.tar. It appears only when it is
            complete.
        source: kind of ``src`` where its name does not tell.
        columns: modality -> column of a manifest; default the columns called text, image, audio,
            else the one called segments: lists of {modality: value}, interleaved samples.
        root: folder that a manifest's relative paths start from; default its own.
        tokenizers: folder of one tokenizer a modality, or modality -> folder; the shards then hold
            tokens.
        vocabulary: an older one, to be appended to.
        split: put all samples into this split; default what the source says, else "train".
        val_share: share of "train" that becomes "val", by hash of the key (of one text file: its
            end).
        shard_mb: size of a shard in 10**6 bytes.
        max_bad: share of samples that may be unreadable. One bad sample never stops a pack.
        overwrite: replace a pack of other content or settings.
        caption_from, caption_regex, caption_map, incomplete: of folders, see `FolderConfig`.
        document_bytes: of one text file, see `TextConfig`.
        segments: of a folder: `a.000.txt`, `a.001.png`, ... are one interleaved sample. A table
            has a column for that, see ``columns``.
        tokenized: the columns of the table hold lists of token ids that ``tokenizers`` made (here
            also a ``tokenizer.json``; default the one beside ``src``), whose fingerprint goes into
            the shards.
        license: goes into the manifest.
        limits: largest image, recording and text.
        dedupe: leave out samples whose content came before: "sample" compares all modalities, a
            modality's name that one alone.
        workers: processes that read, check and encode samples; they join a pack that takes longer
            than a second (tokens: eight), and change no byte of it. None: one a core.
        progress: show a bar.
    Raises:
        UserError: nothing to pack, a missing column, more bad samples than ``max_bad``, or ``out``
            is taken.
    """
    started = time.monotonic()
    src, out = Path(src), Path(out)
    given = {
        "columns": dict(columns) if columns else None,
        "root": root,
        "caption_from": caption_from,
        "caption_regex": caption_regex,
        "caption_map": dict(caption_map) if caption_map else None,
        "incomplete": incomplete,
        "document_bytes": document_bytes,
        "segments": segments or None,
    }
    specs = []
    if tokenized:
        named = [m for m in columns or () if m != SEGMENTS]
        specs = token_specs(tokenizers, src, named)
        given["tokenized"] = [spec.modality for spec in specs]
    origin = open_source(src, source, given, val_share)
    _check_settings(split, val_share, max_bad, shard_mb)
    if dedupe is not None and dedupe not in (known := ("sample", *sorted(NATIVE))):
        raise UserError(f"--dedupe {dedupe}: unknown{did_you_mean(dedupe, known)}")
    if src.resolve() in (out.resolve(), *(out.resolve().parents if src.is_dir() else ())):
        raise UserError(f"--out {out} lies in the source {src}; choose another folder")
    limits = limits or Limits()
    encoder: Encoder | TokenIds | None = None
    words: Vocabulary | None = None
    old = Vocabulary.load(vocabulary) if isinstance(vocabulary, (str, Path)) else vocabulary
    if tokenized:
        words, encoder = merged(specs, old), TokenIds(specs)
    elif tokenizers is not None:
        opened = open_tokenizers(tokenizers)
        words, encoder = vocabulary_of(opened, old), Encoder(opened, limits)
    settings = {k: v for k, v in given.items() if v is not None and k != "root"} | {
        "split": split,
        "val_share": val_share,
        "shard_mb": shard_mb,
        "limits": limits._asdict(),
        "vocabulary": words.fingerprint if words else None,
        "tokenizers": sorted(encoder.tokenizers) if encoder else None,
    }
    if dedupe is not None:
        settings["dedupe"] = dedupe
    settings = json.loads(json.dumps(settings))
    identity = hashlib.sha256(
        json.dumps([VERSION, origin.fingerprint(), settings], sort_keys=True).encode()
    ).hexdigest()
    done = _already(out, identity, overwrite)
    if done is not None:
        return done

    with atomic_folder(out, identity) as part:
        run = Run(
            part, split, 0.0 if origin.splits_itself else val_share, shard_mb, max_bad, identity
        )
        try:
            # A batch is the same after a restart: the journal is written between two of them.
            rest = islice(origin, run.records, None)
            ready = batches(
                rest, Work(limits, dedupe, encoder), BATCH if encoder else 1, workers or cores()
            )
            with contextlib.closing(ready):  # ends the workers whatever happens here
                shown = ready
                if progress:
                    shown = _bar(ready, origin.count(), f"packing {src.name}", run.records)
                for items, results in shown:
                    if encoder:
                        run.add(items, encoder, results)
                        run.save(encoder)
                        continue
                    for p in items:
                        run.add([p], None)
                        run.save(None)
            run.check_budget(final=True)
        except UserError:
            run.abort(out)
            raise
        if not run.good:
            run.abort(out)
            raise UserError(
                f"{src}: nothing to pack; {run.reasons() or 'the source has no sample'}"
            )
        entries = run.finish()
        found = sorted({m for entry in entries.values() for m in entry["lengths"]}, key=_rank)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "tokens" if encoder else "raw",
            "modalities": found,
            "source": src.name,
            "license": license or _license(src),
            "identity": identity,
            "settings": settings,
            "quarantined": run.bad,
            "rejected": dict(run.kinds.most_common(REASONS)),
            "duplicates": run.duplicates,
            "ignored": origin.ignored,
            "splits": entries,
        }
        if encoder and words:
            words.save(part / VOCABULARY)
            manifest["left_out"] = sorted(encoder.left_out | run.left_out)
            manifest["vocabulary"] = {
                "fingerprint": words.fingerprint,
                "size": words.size,
                "ranges": [
                    spec._asdict() | words.range(spec.modality)._asdict() for spec in words.ranges
                ],
            }
        write_manifest(part, manifest)
    return _report(out, manifest, time.monotonic() - started)


def _already(out: Path, identity: str, overwrite: bool) -> PackReport | None:
    """The report of a pack that is there already.

    Raises UserError when ``out`` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is no packed data; choose another --out")
    if overwrite:
        return None
    manifest = read_manifest(out)
    if manifest["identity"] != identity:
        raise UserError(
            f"{out} was packed from another source or with other settings; replace it with "
            "--overwrite, or choose another --out"
        )
    return _report(out, manifest, 0.0, already=True)


def _report(
    out: Path, manifest: Mapping[str, Any], seconds: float, already: bool = False
) -> PackReport:
    modalities: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    for entry in manifest["splits"].values():
        for modality, summary in entry["lengths"].items():
            modalities[modality] += summary["count"]
            lengths[modality] += summary["total"]
    return PackReport(
        out,
        manifest["kind"],
        {s: e["samples"] for s, e in manifest["splits"].items()},
        dict(modalities),
        dict(lengths),
        sum(e["bytes"] for e in manifest["splits"].values()),
        manifest["quarantined"],
        seconds,
        already,
        dict(manifest["ignored"]),
        tuple(manifest.get("left_out", ())),
        dict(manifest.get("rejected", {})),
        manifest.get("duplicates", 0),
        {s: e.get("histograms", {}) for s, e in manifest["splits"].items()},
    )


def _check_settings(split: str | None, val_share: float, max_bad: float, shard_mb: float) -> None:
    if split is not None and not SAFE_SPLIT.fullmatch(SPLITS.get(split, split)):
        raise UserError(f"--split {split}: use a plain lower-case word, such as train, val or test")
    for name, value, top in (("--val-share", val_share, 1.0), ("--max-bad", max_bad, 1.0)):
        if not 0 <= value <= top:
            raise UserError(f"{name} {value}: must be between 0 and {top:g}")
    if shard_mb <= 0:
        raise UserError(f"--shard-mb {shard_mb}: must be above 0")


def _license(src: Path) -> str:
    """The license of the shards that these are made from."""
    return str(read_manifest(src).get("license", "")) if (src / MANIFEST).is_file() else ""


def _rank(modality: str) -> tuple[int, str]:
    order = ("text", "bytes", "image", "audio")
    return (order.index(modality) if modality in order else len(order), modality)


def _bar(
    ready: Iterable[PreparedBatch], total: int | None, title: str, done: int
) -> Iterator[PreparedBatch]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        row = bars.add_task(title, total=total, completed=done)
        for batch in ready:
            yield batch
            bars.advance(row, len(batch.items))
