"""Rows that continue: row r of a batch goes on where row r of the batch before it stopped.

Row r of R reads samples r, r + R, r + 2 R, ... of the order, one document after the other, a window
of ``seq_len`` tokens a step; so its documents depend on the seed alone, and the windows of a row
join to its documents. A model carries the State of every row from step to step
(`mm.trainer.stateful`), so a document may be longer than a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

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
from mm.data.streams.documents import TokenSource
from mm.data.streams.shuffle import key_of, permute
from mm.data.streams.single_source import SingleSourceConfig, SingleSourceStream
from mm.data.streams.survey import Drawn
from mm.errors import UserError
from mm.registry import STREAMS
from mm.specs import Segment

SALT = "lanes"  # of the order: another word would change the data of every run


@STREAMS.register("stateful")
class StatefulConfig(SingleSourceConfig):
    """Rows that go on where the same row of the step before stopped."""

    continues_documents: ClassVar[bool] = True

    kind: Literal["stateful"] = "stateful"
    seq_len: Annotated[int, Field(gt=3, description="tokens of one window")] = 256
    batch_size: Annotated[
        int, Field(gt=0, description="rows of one optimizer step over all processes")
    ] = 8
    max_documents: Annotated[
        int, Field(gt=0, description="documents of one row; shapes depend on it")
    ] = 8
    max_length: Annotated[
        int,
        Field(
            gt=3,
            description="longer documents are left out and counted; attention without a window "
            "keeps this many keys a row",
        ),
    ] = 2048

    @classmethod
    def smallest(cls) -> StatefulConfig:
        return cls(source=TokenSource(path=Path("tokens")), seq_len=16, batch_size=4)

    @property
    def stream(self) -> type[StatefulStream]:
        return StatefulStream


class StatefulStream(SingleSourceStream[StatefulConfig]):
    """See `StatefulConfig`.

    ``stats`` of the last step: padding_share, documents (begun), tokens by modality, filtered,
    too_long. ``labels["row"]`` of a micro-batch (B,) int32 numbers its rows in the whole step;
    the documents of its b-th row read and write State slot b.
    """

    def prepare(self) -> dict[str, Any]:
        config = self.config
        self.carried_rows, self.max_length = config.batch_size, config.max_length
        self._documents: dict[int, DocumentTokens | str] = {}  # of the samples that rows are in
        return self.source_plan() | {
            "seq_len": config.seq_len,
            "max_documents": config.max_documents,
            "max_length": config.max_length,
        }

    def start(self) -> dict[str, int]:
        """``number/r``: samples that row r is done with; ``index/r``: its token in the next one."""
        rows = range(self.config.batch_size)
        return {"step": 0, **{f"{k}/{r}": 0 for r in rows for k in ("number", "index")}}

    @property
    def epoch(self) -> float:
        """Passes over the source of the row that is behind, up to the last consumed step."""
        done = min(self._cursor[f"number/{r}"] for r in range(self.carried_rows))
        return done * self.carried_rows / len(self.shards)

    def advance(self, cursor: Mapping[str, int]) -> Step:
        after = {"step": cursor["step"] + 1}
        stats: dict[str, Any] = dict.fromkeys(("documents", "filtered", "too_long"), 0)
        rows, keys, used = [], [], 0
        for r in range(self.carried_rows):
            number, index = cursor[f"number/{r}"], cursor[f"index/{r}"]
            row, free, skipped = [], self.config.seq_len, 0
            while free and len(row) < self.config.max_documents:
                sample = number * self.carried_rows + r
                document = self._document(sample)
                if isinstance(document, str):
                    stats[document] += 1
                    number, skipped = number + 1, skipped + 1
                    if skipped > max(64, len(self.shards)):
                        raise UserError(
                            f"{self.config.source.path}: row {r} found no document of at most "
                            f"data.max_length {self.config.max_length} in {skipped} samples: raise "
                            "it, or change the transform"
                        )
                    continue
                n = min(free, len(document.ids) - index)
                here = slice(index, index + n)
                row.append(
                    Piece(
                        document.part(index, index + n),
                        document.target_modality[here],
                        start=index,
                        fresh=index == 0,
                    )
                )
                keys.append((r, self._key(sample)))
                stats["documents"] += index == 0
                free, index = free - n, index + n
                if index == len(document.ids):
                    number, index = number + 1, 0
                    self._documents.pop(sample, None)
            rows.append(row)
            used += self.config.seq_len - free
            after |= {f"number/{r}": number, f"index/{r}": index}
        micros = []
        for numbers in self.own_rows:
            part = [[piece._replace(slot=b) for piece in rows[r]] for b, r in enumerate(numbers)]
            batch = pieces_to_batch(
                part,
                self.vocabulary,
                self.config.seq_len,
                self.config.max_documents * len(part),
                [key for r, key in keys if r in numbers],
            )
            numbered = torch.tensor(list(numbers), dtype=torch.int32)
            micros.append(replace(batch, labels={**batch.labels, "row": numbered}))
        seen = np.concatenate([p.tokens.modality for row in rows for p in row] or [np.zeros(0)])
        total = np.bincount(seen.astype(np.int64), minlength=1)
        ranges = {self.vocabulary.range(m).index: m for m in self.vocabulary.modalities}
        stats["tokens"] = {ranges[i]: int(n) for i, n in enumerate(total) if n and i in ranges}
        stats["padding_share"] = 1 - used / (self.carried_rows * self.config.seq_len)
        return Step(micros, after, stats)

    def fate(self, raw: list[Segment], made: list[Segment] | None) -> str:
        if not made:
            return "filtered"
        return "too_long" if document_length(made) > self.config.max_length else ""

    def epochs_of(self, steps: int, drawn: Sequence[Drawn]) -> list[float]:
        lengths = np.array([document_length(d) for d in drawn[0].segments])
        epoch = float((lengths * drawn[0].weight).sum()) * len(self.shards)
        return [steps * self.carried_rows * self.config.seq_len / epoch if epoch else 0.0]

    def mend(self, why: str, longest: int) -> str:
        too_long = f"data.max_length={longest} takes all"
        return too_long if why == "too_long" else "give any_to_any a task for them"

    def _index(self, sample: int) -> tuple[int, int]:
        """Epoch and number in the shards of sample ``sample`` of the order."""
        epoch, position = divmod(sample, len(self.shards))
        own = key_of(self.seed, SALT, epoch)
        return epoch, int(permute(np.array([position]), len(self.shards), own)[0])

    def _key(self, sample: int) -> str:
        return self.shards.key(self._index(sample)[1])

    def _document(self, sample: int) -> DocumentTokens | str:
        """All tokens of a sample, or the reason why it is left out."""
        if sample not in self._documents:
            epoch, i = self._index(sample)
            segments = self.apply_transforms(0, self.segments(0, i), key_of(SALT), epoch, i)
            segments = segments or []
            why = self.fate(segments, segments)
            found = why or document_tokens(segments, self.vocabulary)
            while len(self._documents) > 4 * self.carried_rows:  # a stream that was moved left some
                self._documents.pop(next(iter(self._documents)))
            self._documents[sample] = found
        return self._documents[sample]
