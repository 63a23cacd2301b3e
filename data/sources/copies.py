"""Several copies of every training sample, varied so that what it shows stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mm.data.modalities.base import get_modality
from mm.data.shards.members import split_ordinal
from mm.data.sources.base import Record, Source
from mm.data.streams.shuffle import key_of

MARK = "~"  # between the key of a sample and the number of its copy


class Copies(Source):
    """``n`` of each sample of the split train: as it is, then varied by `Modality.vary`.

    The others stay alone: what is measured is real.
    """

    def __init__(self, source: Source, n: int):
        self.source, self.n = source, n
        self.splits_itself = source.splits_itself

    def count(self) -> int | None:
        return None  # how many are of train is not known before they are read

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def __iter__(self) -> Iterator[Record]:
        for record in self.source:
            yield record
            if record.split != "train" or record.bad:
                continue
            for number in range(1, self.n):
                key = f"{record.key}{MARK}{number}"
                values = {
                    member: Varied(read, split_ordinal(member)[1], key_of("vary", key, member))
                    for member, read in record.values.items()
                }
                yield record._replace(key=key, where=f"{record.where}{MARK}{number}", values=values)
        self.ignored = self.source.ignored


@dataclass(frozen=True, slots=True)
class Varied:
    """A reader of a varied file."""

    read: Callable[[], bytes]
    modality: str
    key: int

    def __call__(self) -> bytes:
        return get_modality(self.modality).vary(self.read(), self.key)
