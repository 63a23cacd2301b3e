"""Read, check and encode records of a pack, in this process or as a worker process of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mm.data.modalities.base import BadSample, Modality
from mm.data.pack.encode import Encoder, Item, Result
from mm.data.pack.pretokenized import TokenIds
from mm.data.shards.members import member_modality, segment_words, split_ordinal
from mm.data.sources.base import Record
from mm.errors import UserError


class PreparedRecord(NamedTuple):
    """A record whose bytes were read and, for raw shards, proved to be decodable."""

    record: Record
    raws: dict[str, bytes]  # by member
    kinds: dict[str, str]  # member -> what its member is called: the true extension
    lengths: dict[str, int]  # by member
    bad: str
    digest: bytes = b""  # of the content that makes a duplicate


class PreparedBatch(NamedTuple):
    """A batch of records. ``results``: their codes, where they are encoded already."""

    items: list[PreparedRecord]
    results: list[Result] | None = None


class Failure(NamedTuple):
    """What a worker could not do, and why."""

    record: Record
    reason: str
    mendable: bool  # a UserError
    trace: str


class Work(NamedTuple):
    """What to do with records: the settings of a pack that a worker process needs."""

    modalities: Mapping[str, Modality]  # with the settings of this pack
    dedupe: str | None
    encoder: Encoder | TokenIds | None  # None: raw shards, whose values are decoded to check them

    def prepare(self, record: Record) -> PreparedRecord:
        """Read one record, and check it where it will not be encoded."""
        raws: dict[str, bytes] = {}
        kinds: dict[str, str] = {}
        lengths: dict[str, int] = {}
        try:
            if record.bad:
                raise BadSample(record.bad)
            for member, read in record.values.items():
                ordinal, modality = split_ordinal(member)
                try:
                    raws[member] = read()
                    if self.encoder is None and not raws[member]:
                        raise BadSample(f"{modality}: empty file")
                    if not isinstance(self.encoder, TokenIds):
                        self.modalities[modality].check_whole(raws[member])
                    if self.encoder is None:
                        extension, lengths[member] = self.modalities[modality].check(raws[member])
                        kinds[member] = ordinal + extension
                except BadSample as error:
                    raise BadSample(f"{segment_words(member)}{error}") from error
        except BadSample as error:
            return PreparedRecord(record, {}, {}, {}, str(error))
        return PreparedRecord(record, raws, kinds, lengths, "", content(raws, self.dedupe))

    def prepare_batch(self, records: Sequence[Record]) -> PreparedBatch:
        """Read and encode a batch, and drop what its writer does not need: sent between processes.

        ``results[n].rest`` is the number of the item.
        """
        items = [self.prepare(record) for record in records]
        results = None
        if self.encoder is not None:
            wanted = [Item(p.raws, n) for n, p in enumerate(items) if not p.bad]
            results = self.encoder.encode(wanted)
            items = [p._replace(raws=dict.fromkeys(p.raws, b"")) for p in items]
        return PreparedBatch(
            [p._replace(record=p.record._replace(values={})) for p in items], results
        )


def content(raws: Mapping[str, bytes], dedupe: str | None) -> bytes:
    """Hash of what makes a duplicate: all modalities, or one; b"" where that one is absent."""
    chosen = [s for s in sorted(raws) if dedupe == "sample" or member_modality(s) == dedupe]
    if dedupe is None or not chosen:
        return b""
    digest = hashlib.blake2b(digest_size=16)
    for member in chosen:
        digest.update(f"{member}\0{len(raws[member])}\0".encode())
        digest.update(raws[member])
    return digest.digest()


def join_batches(parts: Sequence[PreparedBatch]) -> PreparedBatch:
    """Batches one after the other as one."""
    items = [p for part in parts for p in part.items]
    if any(part.results is None for part in parts):
        return PreparedBatch(items)
    out, first = [], 0
    for part in parts:
        out += [r._replace(rest=r.rest + first) for r in part.results or ()]
        first += len(part.items)
    return PreparedBatch(items, out)


def main() -> None:
    """Serve one parent: first the `Work`, then lists of records, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    inward, outward = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers

    def answer(value: Any) -> None:
        outward.write(pickle.dumps(value))
        outward.flush()

    def requests() -> Iterator[bytes]:
        while len(head := inward.read(8)) == 8:
            yield inward.read(int.from_bytes(head, "little"))

    messages = requests()
    try:
        work: Work = pickle.loads(next(messages))
    except Exception as error:  # such as a class of the parent's own script
        answer(f"{type(error).__name__}: {error}")
        return
    answer(True)
    with contextlib.suppress(BrokenPipeError):
        for message in messages:
            answer(_served(work, pickle.loads(message)))


def _served(work: Work, records: list[Record]) -> PreparedBatch | Failure:
    try:
        return work.prepare_batch(records)
    except Exception:  # which of them was it?
        parts = []
        for record in records:
            try:
                parts.append(work.prepare_batch([record]))
            except Exception as error:
                plain = record._replace(values={})
                known = isinstance(error, UserError)
                reason = str(error) if known else f"{type(error).__name__}: {error}"
                return Failure(plain, reason, known, traceback.format_exc())
        return join_batches(parts)


if __name__ == "__main__":
    from mm.data.pack import worker  # the module that the parent knows its classes by

    worker.main()
