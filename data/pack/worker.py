"""From a record to what is written: read, check and encode. Runs here or in a worker process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mm.data.modalities.decode import BadSample, Limits, check
from mm.data.pack.encode import Encoder, Item, Result
from mm.data.pack.pretokenized import TokenIds
from mm.data.shards.members import modality_in, parse, place
from mm.data.sources.base import Record


class Prepared(NamedTuple):
    """A record whose bytes were read and, for raw shards, proved to be decodable."""

    record: Record
    raws: dict[str, bytes]  # by slot
    kinds: dict[str, str]  # slot -> what its member is called: the true extension
    lengths: dict[str, int]  # by slot
    bad: str
    digest: bytes = b""  # of the content that makes a duplicate


class Done(NamedTuple):
    """A batch of records. ``results``: their codes, where they are encoded already."""

    items: list[Prepared]
    results: list[Result] | None = None


class Work(NamedTuple):
    """What to do with records: the settings of a pack that a worker process needs."""

    limits: Limits
    dedupe: str | None
    encoder: Encoder | TokenIds | None  # None: raw shards, whose values are decoded to check them

    def read(self, record: Record) -> Prepared:
        """Read one record, and check it where it will not be encoded."""
        raws: dict[str, bytes] = {}
        kinds: dict[str, str] = {}
        lengths: dict[str, int] = {}
        try:
            if record.bad:
                raise BadSample(record.bad)
            for slot, read in record.values.items():
                ordinal, modality = parse(slot)
                try:
                    raws[slot] = read()
                    if self.encoder is None:
                        kind, lengths[slot] = check(modality, raws[slot], self.limits)
                        kinds[slot] = ordinal + kind
                except BadSample as error:
                    raise BadSample(f"{place(slot)}{error}") from error
        except BadSample as error:
            return Prepared(record, {}, {}, {}, str(error))
        return Prepared(record, raws, kinds, lengths, "", content(raws, self.dedupe))

    def all(self, records: Sequence[Record]) -> Done:
        """Read and encode a batch, and drop what its writer does not need: sent between processes.

        ``results[n].rest`` is the number of the item.
        """
        items = [self.read(record) for record in records]
        results = None
        if self.encoder is not None:
            wanted = [Item(p.raws, n) for n, p in enumerate(items) if not p.bad]
            results = self.encoder.encode(wanted)
            items = [p._replace(raws=dict.fromkeys(p.raws, b"")) for p in items]
        return Done([p._replace(record=p.record._replace(values={})) for p in items], results)


def content(raws: Mapping[str, bytes], dedupe: str | None) -> bytes:
    """Hash of what makes a duplicate: all modalities, or one; b"" where that one is absent."""
    chosen = [s for s in sorted(raws) if dedupe == "sample" or modality_in(s) == dedupe]
    if dedupe is None or not chosen:
        return b""
    digest = hashlib.blake2b(digest_size=16)
    for slot in chosen:
        digest.update(f"{slot}\0{len(raws[slot])}\0".encode())
        digest.update(raws[slot])
    return digest.digest()
