"""What a pack has written: shards by split, keys and contents seen, quarantine, and a journal.

With the journal a pack that was killed goes on where it was.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.data.chat.conversation import EMPTY
from mm.data.chat.encode import TOO_LONG
from mm.data.pack.config import PackConfig
from mm.data.pack.encode import Encoder, Item, Result
from mm.data.pack.pretokenized import TokenIds
from mm.data.pack.worker import PreparedRecord
from mm.data.pack.writer import PROGRESS, SAMPLES, SplitWriter, safe_key
from mm.data.shards.members import sum_by_modality
from mm.data.shards.reader import QUARANTINE
from mm.data.shards.token_codec import encode_member
from mm.data.sources.base import SAFE_SPLIT, SPLITS, Record
from mm.data.sources.folder import metadata
from mm.data.streams.shuffle import key_of
from mm.errors import UserError

EARLY = 1000  # samples after which the budget may stop a pack before its end
JOURNAL_SECONDS = 10.0  # work that a kill may cost
DUPLICATES, SKIPPED = "duplicates.jsonl", "skipped.jsonl"
SKIPS = (EMPTY, TOO_LONG)  # reasons of samples that are sound: they do not count against max_bad


class PackOutput:
    """The folder of a pack that is being made; a function of the records in their order alone.

    Args:
        part: the folder.
        config: split, shares and sizes.
        splits_itself: the source has applied ``val_share`` already.
        identity: of what is packed; a journal of another one is not gone on with.
    """

    def __init__(self, part: Path, config: PackConfig, splits_itself: bool, identity: str):
        self.part, self.identity = part, identity
        self.split, self.shard_mb, self.max_bad = config.split, config.shard_mb, config.max_bad
        self.val_share = 0.0 if splits_itself else config.val_share
        self.writers: dict[str, SplitWriter] = {}
        self.seen: dict[str, str] = {}  # key -> where
        self.contents: dict[bytes, str] = {}  # digest -> key
        self.records = self.good = self.bad = self.duplicates = 0
        self.left_out: set[str] = set()
        self.kinds: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()  # of fine samples that nothing can be learnt of
        self._first: dict[str, str] = {}
        self._saved = time.monotonic()
        state = self._restore()
        sizes = state.get("files", {})
        self._files = {
            name: _open_at(part / name, sizes.get(name, 0))
            for name in (QUARANTINE, DUPLICATES, SKIPPED, SAMPLES)
        }

    def _restore(self) -> dict[str, Any]:
        """Go on from the journal, if this folder has one."""
        path = self.part / PROGRESS
        if not path.is_file():
            return {}
        state = json.loads(path.read_text(encoding="utf-8"))
        for name in ("records", "good", "bad", "duplicates"):
            setattr(self, name, state[name])
        self.kinds, self._first = Counter(state["kinds"]), state["first"]
        self.left_out = set(state["left_out"])
        self.skipped = Counter(state.get("skipped", {}))
        lengths: dict[str, dict[str, dict[str, int]]] = {}
        with open(self.part / SAMPLES, "rb") as file:
            for line in file.read(state["files"][SAMPLES]).splitlines():
                key, where, split, n, digest = json.loads(line)
                self.seen[key] = where
                if split is not None:
                    lengths.setdefault(split, {})[key] = n
                    if digest:
                        self.contents[bytes.fromhex(digest)] = key
        for split, entry in state["splits"].items():
            self.writers[split] = SplitWriter(self.part / split, self.shard_mb)
            self.writers[split].restore(entry, lengths.get(split, {}))
        return state

    def save(self, encoder: Encoder | TokenIds | None, seconds: float | None = None) -> None:
        """Write the journal when the last one is old enough, after all that it names."""
        if seconds is None:
            seconds = JOURNAL_SECONDS
        if time.monotonic() - self._saved < seconds:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {
            "identity": self.identity,
            "records": self.records,
            "good": self.good,
            "bad": self.bad,
            "duplicates": self.duplicates,
            "kinds": self.kinds,
            "first": self._first,
            "skipped": self.skipped,
            "left_out": sorted(self.left_out | (encoder.left_out if encoder else set())),
            "files": {name: file.tell() for name, file in self._files.items()},
            "splits": {split: writer.state() for split, writer in self.writers.items()},
        }
        path = self.part / PROGRESS
        new = path.with_name(path.name + ".new")
        with open(new, "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        self._saved = time.monotonic()

    def add(
        self,
        batch: Sequence[PreparedRecord],
        encoder: Encoder | TokenIds | None,
        results: Sequence[Result] | None = None,
    ) -> None:
        """Write a batch of samples, encoded when there is an encoder, or by it already.

        ``results[n].rest`` is then the index in ``batch``; those of samples that are left out do
        not count.
        """
        self.records += len(batch)
        fine: list[int] = []
        for n, p in enumerate(batch):
            if p.digest in self.contents and not p.bad:
                self._duplicate(p)
                continue
            reason = p.bad or self._name(p.record)
            if reason:
                self._reject(p.record, reason)
                continue
            if p.digest:
                self.contents[p.digest] = p.record.key
            fine.append(n)
        if encoder is None:
            for p in (batch[n] for n in fine):
                self._write(p, {p.kinds[m]: data for m, data in p.raws.items()}, p.lengths)
            return
        items = [Item(batch[n].raws, n) for n in fine]
        if results is None:
            results = _encoded(encoder, items, batch)
        else:
            encoder.note(items)
            kept = set(fine)
            results = [r for r in results if r.rest in kept]
        for n, encoded, bad in results:
            p = batch[n]
            if bad:
                self.contents.pop(p.digest, None)
                self._log([safe_key(p.record.key), p.record.where, None, None, ""])
                self._reject(p.record, bad)
                continue
            members = {m: encode_member(code) for m, code in encoded.items()}
            files = {f"{m}.npy": data for m, (data, _) in members.items()}
            side = {m: code.side for m, code in encoded.items() if code.side}
            if side:
                files["side.json"] = metadata(side)
            self._write(p, files, {m: places for m, (_, places) in members.items()})

    def _duplicate(self, p: PreparedRecord) -> None:
        self.duplicates += 1
        _line(
            self._files[DUPLICATES],
            {"source": p.record.where, "key": p.record.key, "same_as": self.contents[p.digest]},
        )

    def _log(self, values: list[Any]) -> None:
        _line(self._files[SAMPLES], values)

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

    def _write(self, p: PreparedRecord, files: dict[str, bytes], lengths: dict[str, int]) -> None:
        record, key = p.record, safe_key(p.record.key)
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
        lengths = sum_by_modality(lengths)
        self.writers[split].write(key, files, lengths)
        self._log([key, record.where, split, lengths, p.digest.hex()])
        self.good += 1

    def _reject(self, record: Record, reason: str) -> None:
        if (skip := next((s for s in SKIPS if reason.startswith(s)), None)) is not None:
            self.skipped[skip.removesuffix(": ")] += 1
            line = {"source": record.where, "key": record.key, "reason": reason}
            _line(self._files[SKIPPED], line)
            return
        self.bad += 1
        kind = re.sub(r"'[^']*'|\d+", "*", reason)
        self.kinds[kind] += 1
        self._first.setdefault(kind, f"{reason} ({record.where})")
        _line(
            self._files[QUARANTINE],
            {"source": record.where, "key": record.key, "reason": reason},
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

    def reasons(self, n: int = 3) -> str:
        """The commonest reasons, each with its first sample."""
        return "; ".join(
            f"{count} x {self._first[kind]}" for kind, count in self.kinds.most_common(n)
        )

    def left_out_words(self) -> str:
        """Why sound samples were left out; that there is none, where none was."""
        found = ", ".join(f"{count} x {why}" for why, count in self.skipped.most_common())
        return f"left out: {found}" if found else "the source has no sample"

    def examples(self, n: int = 10) -> dict[str, str]:
        """The commonest kinds of reasons -> the first of each in full, with its sample."""
        return {kind: self._first[kind] for kind, _ in self.kinds.most_common(n)}

    def abort(self, out: Path) -> Path | None:
        """Keep the quarantine beside ``out``, where it survives the temporary folder."""
        for writer in self.writers.values():
            writer.abort()
        self._close()
        if not self.bad:
            return None
        return (self.part / QUARANTINE).replace(out.parent / f"{out.name}.{QUARANTINE}")

    def finish(self) -> dict[str, Any]:
        self._close()
        if not self.bad:
            (self.part / QUARANTINE).unlink()
        if not self.duplicates:
            (self.part / DUPLICATES).unlink()
        if not self.skipped:
            (self.part / SKIPPED).unlink()
        order = {"train": 0, "val": 1, "test": 2}
        return {
            s: self.writers[s].finish()
            for s in sorted(self.writers, key=lambda s: (order.get(s, 3), s))
        }

    def _close(self) -> None:
        for file in self._files.values():
            file.close()


def _encoded(
    encoder: Encoder | TokenIds, items: Sequence[Item], batch: Sequence[PreparedRecord]
) -> list[Result]:
    """Codes of the items; what a tokenizer raises gets the name of the sample."""
    try:
        return encoder.encode(items)
    except Exception:
        for item in items:
            try:
                encoder.encode([item])
            except Exception as error:
                record = batch[item.rest].record
                error.add_note(f"at sample '{record.key}' ({record.where})")
                raise
        raise


def _open_at(path: Path, size: int) -> Any:
    file = open(path, "r+b" if path.is_file() else "wb")  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file


def _line(file: Any, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False) + "\n"
    file.write(text.encode("utf-8", "backslashreplace"))
