"""PackJob: any source to shards that training reads, raw or as tokens.

Atomic, repeatable, and nothing is lost silently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mm.config import validate
from mm.data.chat.encode import ChatEncoder
from mm.data.chat.template import ChatTemplate, template_of
from mm.data.modalities.base import Modality, get_modality, sort_key, table
from mm.data.pack.config import PackConfig
from mm.data.pack.encode import Encoder, vocabulary_of
from mm.data.pack.output import PackOutput
from mm.data.pack.pool import batches
from mm.data.pack.pretokenized import TokenIds, token_specs
from mm.data.pack.report import PackReport
from mm.data.pack.worker import PreparedBatch, Work
from mm.data.pack.writer import atomic_folder, write_manifest
from mm.data.shards.manifest import FORMAT, MANIFEST, VERSION, read_manifest
from mm.data.shards.reader import QUARANTINE, VOCABULARY
from mm.data.sources.base import SEGMENTS
from mm.data.sources.chat import ChatSource
from mm.data.sources.copies import Copies
from mm.data.sources.detect import open_source
from mm.data.sources.shards import PackedShards
from mm.errors import UserError
from mm.launch.environment import cores
from mm.tokenizers.load import load_tokenizers
from mm.vocabulary import Vocabulary, extend_vocabulary

BATCH = 256  # samples encoded together
REASONS = 50  # that the manifest lists
# Settings of the source itself; "root" says where its files are, not what they hold.
OF_SOURCE = (
    "columns", "root", "caption_from", "caption_regex", "caption_map", "incomplete",
    "document_bytes", "segments", "follow_links", "map",
)  # fmt: skip


def pack(src: str | Path, out: str | Path, *, progress: bool = True, **settings: Any) -> PackReport:
    """Pack ``src`` into the folder ``out``.

    Args:
        src: a folder or tar of files paired by stem, a JSONL, CSV, TSV or Parquet manifest, a
            Hugging Face data set on disk, one text file, a folder with manifest.jsonl, or packed
            shards.
        out: new folder: manifest.json and <split>/shard-000000.tar. It appears only when it is
            complete.
        progress: show a bar.
        settings: other fields of `PackConfig`.
    Raises:
        UserError: nothing to pack, a missing column, more bad samples than ``max_bad``, or ``out``
            is taken.
    """
    config = validate(PackConfig, {"src": src, "out": out, **settings}, "pack")
    return PackJob(config).run(progress)


class PackJob:
    """One pack: the source, the encoder and the settings that its content depends on.

    A pack that was killed goes on where it was when the same job runs again; its bytes are those of
    a pack in one go.

    Raises:
        UserError: the source or a tokenizer cannot be opened.
    """

    def __init__(self, config: PackConfig):
        self.config = config
        given = {name: getattr(config, name) or None for name in OF_SOURCE}
        specs = []
        if config.tokenized:
            named = [m for m in config.columns or () if m != SEGMENTS]
            specs = token_specs(config.tokenizers, config.src, named)
            given["tokenized"] = [spec.modality for spec in specs]
        self.source = open_source(config.src, config.source, given, config.val_share)
        if config.copies > 1:
            if not isinstance(self.source, PackedShards):
                raise UserError(
                    f"--copies {config.copies}: a copy must not get into another split than its "
                    f"sample: pack {config.src} first, then the packed data with --copies"
                )
            self.source = Copies(self.source, config.copies)
        self.modalities = {m: get_modality(m, config.limits.get(m)) for m in table().modalities}
        self.encoder: Encoder | TokenIds | None = None
        self.vocabulary: Vocabulary | None = None
        self.template: ChatTemplate | None = None  # of conversations
        old = config.vocabulary
        old = Vocabulary.load(old) if isinstance(old, Path) else old
        if config.tokenized:
            self.vocabulary, self.encoder = extend_vocabulary(specs, old), TokenIds(specs)
        elif config.tokenizers is not None:
            opened = load_tokenizers(config.tokenizers)
            self.vocabulary = vocabulary_of(opened, old)
            if isinstance(self.source, ChatSource):
                every = config.loss == "all"
                encoder = ChatEncoder(opened, self.modalities, config.max_tokens, every)
                texts = encoder.tokenizers[encoder.text]
                self.template = self.source.template = template_of(texts, config.template)
                self.encoder = encoder
            else:
                self.encoder = Encoder(opened, self.modalities)
        self._require_fitting_options()
        settings = {k: v for k, v in given.items() if v is not None and k != "root"} | {
            "split": config.split,
            "val_share": config.val_share,
            "shard_mb": config.shard_mb,
            "limits": _limits(self.modalities),
            "vocabulary": self.vocabulary.fingerprint if self.vocabulary else None,
            "tokenizers": sorted(self.encoder.tokenizers) if self.encoder else None,
        }
        if config.copies > 1:
            settings["copies"] = config.copies
        self.dedupe = config.dedupe or ("sample" if self.template else None)
        if self.dedupe is not None:
            settings["dedupe"] = self.dedupe
        if self.template is not None:
            settings["chat"] = {
                "template": self.template.fingerprint,
                "loss": config.loss,
                "max_tokens": config.max_tokens,
            }
        self.settings = json.loads(json.dumps(settings))
        parts = [VERSION, self.source.fingerprint(), self.settings]
        self.identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _require_fitting_options(self) -> None:
        """Raise UserError on options of conversations for another source, or the other way."""
        config = self.config
        if isinstance(self.source, ChatSource):
            if self.template is None:
                raise UserError(
                    f"{config.src}: conversations are packed as tokens, because what a template "
                    "writes depends on them: add --tokenizers DIR"
                )
            return
        defaults = {"template": None, "max_tokens": None, "loss": "assistant"}
        for name, value in defaults.items():
            if getattr(config, name) != value:
                raise UserError(
                    f"{config.src}: --{name.replace('_', '-')} is of conversations, and this "
                    "source holds none; map its columns: --map user=COLUMN --map assistant=COLUMN"
                )

    def run(self, progress: bool = True) -> PackReport:
        """Pack, unless it is done already. Raises UserError, see `pack`."""
        started = time.monotonic()
        out = self.config.out
        manifest = self._packed_already()
        if manifest is not None:
            return PackReport.of(out, manifest, 0.0, already=True)
        with atomic_folder(out, self.identity) as part:
            written = PackOutput(part, self.config, self.source.splits_itself, self.identity)
            try:
                self._write(written, progress)
                written.check_budget(final=True)
                if not written.good:
                    why = written.reasons() or written.left_out_words()
                    raise UserError(f"{self.config.src}: nothing to pack; {why}")
            except UserError as error:
                listed = written.abort(out)
                if listed is None:
                    raise
                raise UserError(f"{error}; what was left out is listed in {listed}") from error
            manifest = self._manifest(written)
            if self.vocabulary:
                self.vocabulary.save(part / VOCABULARY)
            if self.template:
                self.template.save(part)
            write_manifest(part, manifest)
        (out.parent / f"{out.name}.{QUARANTINE}").unlink(missing_ok=True)  # of a pack that stopped
        return PackReport.of(out, manifest, time.monotonic() - started)

    def _write(self, written: PackOutput, progress: bool) -> None:
        """Read, check, encode and write what the journal does not hold yet."""
        config, encoder = self.config, self.encoder
        # A batch is the same after a restart: the journal is written between two of them.
        rest = islice(self.source, written.records, None)
        work = Work(self.modalities, self.dedupe, encoder)
        ready = batches(rest, work, BATCH if encoder else 1, config.workers or cores())
        with contextlib.closing(ready):  # ends the workers whatever happens here
            shown: Iterable[PreparedBatch] = ready
            if progress:
                title = f"packing {config.src.name}"
                shown = _bar(ready, self.source.count(), title, written.records)
            for items, results in shown:
                for batch in [items] if encoder else [[item] for item in items]:
                    written.add(batch, encoder, results)
                    written.save(encoder)

    def _manifest(self, written: PackOutput) -> dict[str, Any]:
        entries = written.finish()
        found = {m for entry in entries.values() for m in entry["lengths"]}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "tokens" if self.encoder else "raw",
            "modalities": sorted(found, key=sort_key),
            "source": self.config.src.name,
            "license": self.config.license or _license(self.config.src),
            "identity": self.identity,
            "settings": self.settings,
            "quarantined": written.bad,
            "rejected": dict(written.kinds.most_common(REASONS)),
            "examples": written.examples(),
            "duplicates": written.duplicates,
            "ignored": self.source.ignored,
            "splits": entries,
        }
        if self.template:
            manifest["skipped"] = dict(written.skipped)
        if self.encoder and self.vocabulary:
            words = self.vocabulary
            manifest["left_out"] = sorted(self.encoder.left_out | written.left_out)
            manifest["vocabulary"] = {
                "fingerprint": words.fingerprint,
                "size": words.size,
                "ranges": [
                    spec.to_dict() | words.range(spec.modality)._asdict() for spec in words.ranges
                ],
            }
        return manifest

    def _packed_already(self) -> dict[str, Any] | None:
        """The manifest of a pack that is there already.

        Raises UserError when ``out`` holds something else.
        """
        out = self.config.out
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out} exists and is no packed data; choose another --out")
        if self.config.overwrite:
            return None
        manifest = read_manifest(out)
        if manifest["identity"] != self.identity:
            raise UserError(
                f"{out} was packed from another source or with other settings; replace it with "
                "--overwrite, or choose another --out"
            )
        return manifest


def _license(src: Path) -> str:
    """The license of the shards that these are made from."""
    return str(read_manifest(src).get("license", "")) if (src / MANIFEST).is_file() else ""


# Packs have always named these limits; others are named where they are set, so that a new modality
# leaves the packs of before what they are.
_ALWAYS = frozenset({"max_text_bytes", "max_pixels", "max_seconds"})


def _limits(modalities: Mapping[str, Modality]) -> dict[str, Any]:
    """Settings of the modalities, as the manifest names them."""
    named = {}
    for m in modalities.values():
        for name, info in type(m).model_fields.items():
            value = getattr(m, name)
            if name in _ALWAYS or (name != "kind" and value != info.default):
                named[name if name in _ALWAYS else f"{m.kind}.{name}"] = value
    return dict(sorted(named.items()))


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
