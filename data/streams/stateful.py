"""Documents that go on in the next batch: every row of a batch is a lane, which reads one document
after the other, a window a step.

Lane l of L takes samples l, l + L, l + 2 L, ... of the order, so it depends on the seed alone, and
the windows of a lane concatenate to its documents. A model carries each lane's State from step to
step (`mm.trainer.lanes`), so a document may be longer than a row. L lanes, T places of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from mm.data.batching.collate import (
    DocumentTokens,
    Piece,
    document_length,
    document_tokens,
    pieces_to_batch,
)
from mm.data.streams.base import Step
from mm.data.streams.packed import PackedSource
from mm.data.streams.shuffle import key_of, permute
from mm.data.streams.single_source import DocumentsConfig, DocumentStream
from mm.errors import UserError
from mm.registry import STREAMS


@STREAMS.register("lanes")
class LanesConfig(DocumentsConfig):
    """Rows that go on where the same row of the step before stopped."""

    kind: Literal["lanes"] = "lanes"
    seq_len: Annotated[int, Field(gt=3, description="places of one window")] = 256
    batch_size: Annotated[
        int, Field(gt=0, description="lanes: rows of one optimizer step over all processes")
    ] = 8
    max_documents: Annotated[
        int, Field(gt=0, description="documents of one row; shapes depend on it")
    ] = 8
    max_length: Annotated[
        int,
        Field(gt=3, description="longer documents are left out and counted; attention without a "
              "window keeps this many keys a lane"),
    ] = 2048  # fmt: skip

    @classmethod
    def smallest(cls) -> LanesConfig:
        return cls(source=PackedSource(path=Path("tokens")), seq_len=16, batch_size=4)

    @property
    def stream(self) -> type[LanesStream]:
        return LanesStream


class LanesStream(DocumentStream[LanesConfig]):
    """See `LanesConfig`.

    ``stats`` of the last step: padding_share, documents (begun), tokens by modality, filtered,
    too_long. ``labels["lane"]`` of a batch (B,) int32 names the lane of each row, whose documents
    have the row as their slot.
    """

    def prepare(self) -> dict[str, Any]:
        config = self.config
        self.lanes, self.max_length = config.batch_size, config.max_length
        self._documents: dict[int, DocumentTokens | str] = {}  # of the samples that lanes are in
        return {
            "seq_len": config.seq_len,
            "max_documents": config.max_documents,
            "max_length": config.max_length,
        }

    def start(self) -> dict[str, int]:
        """``number/l``: samples that lane l is done with; ``place/l``: place in the next one."""
        lanes = range(self.config.batch_size)
        return {"step": 0, **{f"{k}/{i}": 0 for i in lanes for k in ("number", "place")}}

    @property
    def epoch(self) -> float:
        """Passes over the source of the lane that is behind, up to the last consumed step."""
        done = min(self._cursor[f"number/{i}"] for i in range(self.lanes))
        return done * self.lanes / len(self.shards)

    def advance(self, cursor: Mapping[str, int]) -> Step:
        after = {"step": cursor["step"] + 1}
        stats: dict[str, Any] = dict.fromkeys(("documents", "filtered", "too_long"), 0)
        rows, keys, used = [], [], 0
        for lane in range(self.lanes):
            number, place = cursor[f"number/{lane}"], cursor[f"place/{lane}"]
            row, free, skipped = [], self.config.seq_len, 0
            while free and len(row) < self.config.max_documents:
                sample = number * self.lanes + lane
                document = self._document(sample)
                if isinstance(document, str):
                    stats[document] += 1
                    number, skipped = number + 1, skipped + 1
                    if skipped > max(64, len(self.shards)):
                        raise UserError(
                            f"{self.config.source.path}: lane {lane} found no document of at most "
                            f"data.max_length {self.config.max_length} in {skipped} samples: raise "
                            "it, or change the transform"
                        )
                    continue
                n = min(free, len(document.ids) - place)
                here = slice(place, place + n)
                row.append(
                    Piece(
                        document.part(place, place + n),
                        document.target_modality[here],
                        start=place,
                        fresh=place == 0,
                    )
                )
                keys.append((lane, self._key(sample)))
                stats["documents"] += place == 0
                free, place = free - n, place + n
                if place == len(document.ids):
                    number, place = number + 1, 0
                    self._documents.pop(sample, None)
            rows.append(row)
            used += self.config.seq_len - free
            after |= {f"number/{lane}": number, f"place/{lane}": place}
        micros = []
        for numbers in self.own_rows:
            part = [
                [piece._replace(slot=b) for piece in rows[lane]] for b, lane in enumerate(numbers)
            ]
            batch = pieces_to_batch(
                part,
                self.vocabulary,
                self.config.seq_len,
                self.config.max_documents * len(part),
                [key for lane, key in keys if lane in numbers],
            )
            lanes = torch.tensor(list(numbers), dtype=torch.int32)
            micros.append(replace(batch, labels={**batch.labels, "lane": lanes}))
        seen = np.concatenate([p.tokens.modality for row in rows for p in row] or [np.zeros(0)])
        total = np.bincount(seen.astype(np.int64), minlength=1)
        ranges = {self.vocabulary.range(m).index: m for m in self.vocabulary.modalities}
        stats["tokens"] = {ranges[i]: int(n) for i, n in enumerate(total) if n and i in ranges}
        stats["padding_share"] = 1 - used / (self.lanes * self.config.seq_len)
        return Step(micros, after, stats)

    def _index(self, sample: int) -> tuple[int, int]:
        """Epoch and number in the shards of sample ``sample`` of the order."""
        epoch, place = divmod(sample, len(self.shards))
        own = key_of(self.seed, "lanes", epoch)
        return epoch, int(permute(np.array([place]), len(self.shards), own)[0])

    def _key(self, sample: int) -> str:
        return self.shards.key(self._index(sample)[1])

    def _document(self, sample: int) -> DocumentTokens | str:
        """All tokens of a sample, or the reason why it is left out."""
        if sample not in self._documents:
            epoch, i = self._index(sample)
            segments = self.apply_transforms(self.segments(i), key_of("lanes"), epoch, i)
            if not segments:
                found: DocumentTokens | str = "filtered"
            elif document_length(segments) > self.config.max_length:
                found = "too_long"
            else:
                found = document_tokens(segments, self.vocabulary)
            while len(self._documents) > 4 * self.lanes:  # a stream that was moved left some
                self._documents.pop(next(iter(self._documents)))
            self._documents[sample] = found
        return self._documents[sample]
