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

from mm.data.batching.borders import document_length
from mm.data.batching.collate import Piece, document_of, pieces_to_batch
from mm.data.batching.document import DocumentTokens
from mm.data.streams import stats
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
        if self.declared.labels:
            raise UserError(
                f"data 'stateful': '{self.declared.labels[0]}' labels whole documents, which its "
                "windows cut: use data 'packed' or 'bucketed'"
            )
        self._documents: dict[int, DocumentTokens | str] = {}  # of the samples that rows are in
        self.counted = (
            *("documents", "filtered", "too_long", "used", "places"),
            *(f"tokens/{m}" for m in self.vocabulary.modalities),
        )
        return self.source_plan() | {
            "seq_len": config.seq_len,
            "max_documents": config.max_documents,
            "max_length": config.max_length,
        }

    def start(self) -> dict[str, int]:
        """``number/r``: samples that row r is done with; ``index/r``: its token in the next one."""
        own = [r for numbers in self.own_rows for r in numbers]
        return {"step": 0, **{f"{k}/{r}": 0 for r in own for k in ("number", "index")}}

    @property
    def epoch(self) -> float:
        """Passes over the source of the own row that is behind, up to the last consumed step."""
        done = min(n for key, n in self._cursor.items() if key.startswith("number/"))
        return done * self.carried_rows / len(self.shards)

    def advance(self, cursor: Mapping[str, int]) -> Step:
        after = {"step": cursor["step"] + 1}
        counts = dict.fromkeys(self.counted, 0)
        micros = []
        for numbers in self.own_rows:
            rows, keys = [], []
            for b, r in enumerate(numbers):
                row, samples = self._next_row(r, cursor, after, counts)
                rows.append([p._replace(slot=b) for p in row])
                keys += [self._key(sample) for sample in samples]
            batch = pieces_to_batch(
                rows,
                self.vocabulary,
                self.config.seq_len,
                self.config.max_documents * len(rows),
                keys,
                self.declared,
            )
            numbered = torch.tensor(list(numbers), dtype=torch.int32)
            micros.append(replace(batch, labels={**batch.labels, "row": numbered}))
            counts["places"] += len(rows) * self.config.seq_len
            self._count_tokens([piece for row in rows for piece in row], counts)
        return Step(micros, after, counts)

    def _next_row(
        self, r: int, cursor: Mapping[str, int], after: dict[str, int], counts: dict[str, int]
    ) -> tuple[list[Piece], list[int]]:
        """Pieces of row ``r`` and their samples; writes where it goes on to ``after``."""
        number, index = cursor[f"number/{r}"], cursor[f"index/{r}"]
        row: list[Piece] = []
        samples: list[int] = []
        free, skipped = self.config.seq_len, 0
        while free and len(row) < self.config.max_documents:
            sample = number * self.carried_rows + r
            document = self._document(sample)
            if isinstance(document, str):
                counts[document] += 1
                number, skipped = number + 1, skipped + 1
                if skipped > max(64, len(self.shards)):
                    raise UserError(
                        f"{self.config.source.path}: row {r} found no document of at most "
                        f"data.max_length {self.config.max_length} in {skipped} samples: raise "
                        "it, or change the transform"
                    )
                continue
            n = min(free, len(document.ids) - index)
            goal = document.target_modality[index : index + n]
            try:
                part = document.part(index, index + n)
            except ValueError as error:
                raise UserError(
                    f"sample '{self._key(sample)}': {error}: use data 'packed' or 'bucketed'"
                ) from error
            row.append(Piece(part, goal, start=index, fresh=index == 0))
            samples.append(sample)
            counts["documents"] += index == 0
            free, index = free - n, index + n
            if index == len(document.ids):
                number, index = number + 1, 0
                self._documents.pop(sample, None)
        after[f"number/{r}"], after[f"index/{r}"] = number, index
        return row, samples

    def _count_tokens(self, pieces: Sequence[Piece], counts: dict[str, int]) -> None:
        seen = np.concatenate([p.tokens.modality for p in pieces] or [np.zeros(0)])
        total = np.bincount(seen.astype(np.int64), minlength=1)
        ranges = {self.vocabulary.range(m).index: m for m in self.vocabulary.modalities}
        for i, n in enumerate(total.tolist()):
            counts["used"] += n
            if i in ranges:
                counts[f"tokens/{ranges[i]}"] += n

    def summarize(self, counts: Mapping[str, int]) -> dict[str, Any]:
        return {
            **{name: counts[name] for name in ("documents", "filtered", "too_long")},
            "tokens": {m: n for m, n in stats.in_group(counts, "tokens").items() if n},
            "padding_share": stats.padding_share(counts),
        }

    def fate(self, raw: list[Segment], made: list[Segment] | None) -> str:
        if not made or not document_length(made):
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
            found = why or document_of(segments, self.vocabulary, self.shards.key(i))
            while len(self._documents) > 4 * sum(
                map(len, self.own_rows)
            ):  # a stream that was moved left some
                self._documents.pop(next(iter(self._documents)))
            self._documents[sample] = found
        return self._documents[sample]
