"""Pack: any source to shards that training reads, raw or as tokens.

Atomic, repeatable, and nothing is lost silently.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mm.data.decode import BadSample, Limits, check, encode_tokens
from mm.data.encode import Encoder, Item, open_tokenizers, vocabulary_of
from mm.data.order import key_of
from mm.data.shards import FORMAT, MANIFEST, QUARANTINE, VERSION, VOCABULARY, read_manifest
from mm.data.sources.base import SAFE_SPLIT, SPLITS, Record
from mm.data.sources.detect import open_source
from mm.data.sources.folder import metadata
from mm.data.writer import SplitWriter, replacing, safe_key, write_manifest
from mm.errors import UserError
from mm.vocabulary import Vocabulary

log = logging.getLogger(__name__)
BATCH = 256  # samples encoded together
EARLY = 1000  # samples after which the budget may stop a pack before its end


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
    license: str = "",
    limits: Limits | None = None,
    workers: int = 4,
    progress: bool = True,
) -> PackReport:
    """Pack ``src`` into the folder ``out``.

    Args:
        src: a folder or tar of files paired by stem, a JSONL, CSV, TSV or Parquet manifest, one
            text file, a folder with manifest.jsonl, or packed shards.
        out: new folder: manifest.json and <split>/shard-000000.tar. It appears only when it is
            complete.
        source: kind of ``src`` where its name does not tell.
        columns: modality -> column of a manifest; default the columns called text, image, audio.
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
        license: goes into the manifest.
        limits: largest image, recording and text.
        workers: threads that check files.
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
    }
    origin = open_source(src, source, given, val_share)
    _check_settings(split, val_share, max_bad, shard_mb)
    if src.resolve() in (out.resolve(), *(out.resolve().parents if src.is_dir() else ())):
        raise UserError(f"--out {out} lies in the source {src}; choose another folder")
    limits = limits or Limits()
    encoder = words = None
    if tokenizers is not None:
        opened = open_tokenizers(tokenizers)
        old = Vocabulary.load(vocabulary) if isinstance(vocabulary, (str, Path)) else vocabulary
        words = vocabulary_of(opened, old)
        encoder = Encoder(opened, limits)
    settings = {k: v for k, v in given.items() if v is not None and k != "root"} | {
        "split": split,
        "val_share": val_share,
        "shard_mb": shard_mb,
        "limits": limits._asdict(),
        "vocabulary": words.fingerprint if words else None,
        "tokenizers": sorted(encoder.tokenizers) if encoder else None,
    }
    settings = json.loads(json.dumps(settings))
    identity = hashlib.sha256(
        json.dumps([VERSION, origin.fingerprint(), settings], sort_keys=True).encode()
    ).hexdigest()
    done = _already(out, identity, overwrite)
    if done is not None:
        return done

    with replacing(out) as part:
        run = _Run(part, split, 0.0 if origin.splits_itself else val_share, shard_mb, max_bad)
        try:
            prepared = _prepared(origin, limits, encoder is None, workers)
            bar = _bar(prepared, origin.count(), f"packing {src.name}") if progress else prepared
            for batch in _batches(bar, BATCH if encoder else 1):
                run.add(batch, encoder)
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
            "ignored": origin.ignored,
            "splits": entries,
        }
        if encoder and words:
            words.save(part / VOCABULARY)
            manifest["left_out"] = sorted(encoder.left_out)
            manifest["vocabulary"] = {
                "fingerprint": words.fingerprint,
                "size": words.size,
                "ranges": [
                    spec._asdict() | words.range(spec.modality)._asdict() for spec in words.ranges
                ],
            }
        write_manifest(part, manifest)
    return _report(out, manifest, time.monotonic() - started)


class Prepared(NamedTuple):
    """A record whose bytes were read and, for raw shards, proved to be decodable."""

    record: Record
    raws: dict[str, bytes]
    kinds: dict[str, str]  # modality -> true extension
    lengths: dict[str, int]
    bad: str


def _prepare(record: Record, limits: Limits, decode_now: bool) -> Prepared:
    raws: dict[str, bytes] = {}
    kinds: dict[str, str] = {}
    lengths: dict[str, int] = {}
    try:
        if record.bad:
            raise BadSample(record.bad)
        for modality, read in record.values.items():
            raws[modality] = read()
            if decode_now:
                kinds[modality], lengths[modality] = check(modality, raws[modality], limits)
    except BadSample as error:
        return Prepared(record, {}, {}, {}, str(error))
    return Prepared(record, raws, kinds, lengths, "")


def _prepared(
    source: Iterable[Record], limits: Limits, decode_now: bool, workers: int
) -> Iterator[Prepared]:
    """Read and check records in threads, a bounded number ahead, in order."""
    if workers <= 1:
        yield from (_prepare(record, limits, decode_now) for record in source)
        return
    waiting: deque[Future[Prepared]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for record in source:
            waiting.append(pool.submit(_prepare, record, limits, decode_now))
            if len(waiting) >= 8 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Run:
    """State of one pack: writers by split, keys seen, quarantine."""

    def __init__(
        self, part: Path, split: str | None, val_share: float, shard_mb: float, max_bad: float
    ):
        self.part, self.split, self.val_share, self.shard_mb, self.max_bad = (
            part,
            split,
            val_share,
            shard_mb,
            max_bad,
        )
        self.writers: dict[str, SplitWriter] = {}
        self.seen: dict[str, str] = {}  # key -> where
        self.good = self.bad = 0
        self._kinds: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._quarantine = open(part / QUARANTINE, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def add(self, batch: list[Prepared], encoder: Encoder | None) -> None:
        """Write a batch of samples, encoded when there is an encoder."""
        fine = []
        for p in batch:
            reason = p.bad or self._name(p.record)
            if reason:
                self._reject(p.record, reason)
            else:
                fine.append(p)
        if encoder is None:
            for p in fine:
                self._write(p.record, {p.kinds[m]: data for m, data in p.raws.items()}, p.lengths)
            return
        for p, encoded, bad in encoder.encode([Item(p.raws, p) for p in fine]):
            if bad:
                self._reject(p.record, bad)
                continue
            files = {f"{m}.npy": encode_tokens(code.ids) for m, code in encoded.items()}
            side = {m: code.side for m, code in encoded.items() if code.side}
            if side:
                files["side.json"] = metadata(side)
            self._write(p.record, files, {m: len(code.ids) for m, code in encoded.items()})

    def _name(self, record: Record) -> str:
        """Claim the sample's key; returns why it cannot have it."""
        key = safe_key(record.key)
        if key in self.seen:
            return f"duplicate key '{record.key}', first at {self.seen[key]}"
        split = self.split or record.split
        if split is not None and not SAFE_SPLIT.fullmatch(SPLITS.get(split.lower(), split)):
            return f"split '{split}' is no plain lower-case word"
        self.seen[key] = record.where
        return ""

    def _write(self, record: Record, files: dict[str, bytes], lengths: dict[str, int]) -> None:
        key = safe_key(record.key)
        split = self.split or record.split or "train"
        split = SPLITS.get(split.lower(), split)
        if (
            split == "train"
            and self.val_share
            and not self.split
            and key_of("val", key) < self.val_share * 2**64
        ):
            split = "val"
        if record.meta:
            files = {**files, "json": metadata(dict(record.meta))}
        if split not in self.writers:
            self.writers[split] = SplitWriter(self.part / split, self.shard_mb)
        self.writers[split].write(key, files, lengths)
        self.good += 1

    def _reject(self, record: Record, reason: str) -> None:
        self.bad += 1
        kind = re.sub(r"'[^']*'|\d+", "*", reason)
        self._kinds[kind] += 1
        self._first.setdefault(kind, f"{reason} ({record.where})")
        self._quarantine.write(
            json.dumps(
                {"source": record.where, "key": record.key, "reason": reason}, ensure_ascii=False
            )
            + "\n"
        )
        self.check_budget(final=False)

    def check_budget(self, final: bool) -> None:
        """Stop when too much is bad. Raises UserError with the commonest reasons."""
        total = self.good + self.bad
        if self.bad > max(1, self.max_bad * total) and (final or total >= EARLY):
            raise UserError(
                f"{self.bad} of {total} samples are unreadable, more than --max-bad "
                f"{self.max_bad:g}: {self.reasons()}"
            )

    def reasons(self, n: int = 10) -> str:
        """The commonest reasons, each with its first sample."""
        return "; ".join(
            f"{count} x {self._first[kind]}" for kind, count in self._kinds.most_common(n)
        )

    def abort(self, out: Path) -> None:
        """Keep the quarantine beside ``out``, where it survives the temporary folder."""
        for writer in self.writers.values():
            writer.abort()
        self._quarantine.close()
        if self.bad:
            (self.part / QUARANTINE).replace(out.parent / f"{out.name}.{QUARANTINE}")

    def finish(self) -> dict[str, Any]:
        self._quarantine.close()
        if not self.bad:
            (self.part / QUARANTINE).unlink()
        order = {"train": 0, "val": 1, "test": 2}
        return {
            s: self.writers[s].finish()
            for s in sorted(self.writers, key=lambda s: (order.get(s, 3), s))
        }


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


def _batches(items: Iterable[Prepared], size: int) -> Iterator[list[Prepared]]:
    batch: list[Prepared] = []
    for item in items:
        batch.append(item)
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _bar(items: Iterable[Prepared], total: int | None, title: str) -> Iterator[Prepared]:
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
        row = bars.add_task(title, total=total)
        for item in items:
            yield item
            bars.advance(row)
