"""Transcription: what a CTC head reads in a held-out recording, against its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from mm.data.batching.document import of_array
from mm.data.modalities.base import raw_modality
from mm.decoders.books import documents_batch
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.registry import TASKS
from mm.specs import Encoded
from mm.tasks.base import Figures, Task, open_split, spread
from mm.tasks.check import require_modalities
from mm.vocabulary import Vocabulary


@TASKS.register("transcription")
class Transcription(Task):
    """Word error rate of the greedy reading of the head ``to``, one document an item."""

    kind: Literal["transcription"] = "transcription"
    data: Annotated[Path, Field(description="packed raw data")]
    split: Annotated[str, Field(description="split that is reported")] = "test"
    source: Annotated[str, Field(description="modality that is read")] = "audio"
    to: Annotated[str, Field(description="modality of the label, and name of the head")] = "text"
    limit: Annotated[
        int | None, Field(gt=0, description="items at most, evenly spread; default all")
    ] = None
    rows: Annotated[int, Field(gt=0, description="items of one forward")] = 32

    @property
    def about(self) -> str:
        return f"{self.source}_to_{self.to}"

    @classmethod
    def smallest(cls) -> Transcription:
        return cls(data=Path("my_run/data"))

    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        require_modalities((self.source, self.to), vocabulary, tokenizers)
        if not len(self._items(open_split(self.data, self.split))):
            raise UserError(
                f"{self.data}: no sample of split '{self.split}' has '{self.source}' and "
                f"'{self.to}'"
            )

    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Word error rate (edits a word of the reference), and the share of items without any."""
        model: Any = generator.model
        if self.to not in model.heads:
            raise UserError(f"task transcription: model.heads has no '{self.to}'")
        shards = open_split(self.data, self.split, generator.tokenizers)
        items = self._items(shards)
        chosen = [items[k] for k in spread(len(items), self.limit)]
        source, to = raw_modality(self.source).kind, raw_modality(self.to).kind
        codes = generator.encode(self.source, [shards.value(i, source) for i in chosen])
        truth = [str(shards.value(i, to)).split() for i in chosen]
        told: list[list[str]] = []
        for at in range(0, len(codes), self.rows):
            told += self._read(generator, codes[at : at + self.rows])
        edits = [edit_distance(a, b) for a, b in zip(truth, told, strict=True)]
        words = sum(map(len, truth))
        return {
            f"{self.about}_word_error_rate": sum(edits) / max(1, words),
            f"{self.about}_exact": sum(not e for e in edits) / len(edits),
            f"{self.about}_words": words,
        }

    def _items(self, shards: Any) -> list[int]:
        wanted = (raw_modality(self.source).kind, raw_modality(self.to).kind)
        return [
            int(i)
            for i in shards.having(wanted[0])
            if all(shards.lengths(m)[i] >= 0 for m in wanted)
        ]

    @torch.no_grad()
    def _read(self, generator: Generator, codes: Sequence[np.ndarray]) -> list[list[str]]:
        model: Any = generator.model
        device = next(model.parameters()).device
        spec, span = generator.vocabulary.spec(self.source), generator.vocabulary.range(self.to)
        documents = [[of_array(spec, code)._replace(role="condition")] for code in codes]
        batch = documents_batch(model, generator.vocabulary, documents)
        places = batch.layout.cu_seqlens[:-1]
        batch = replace(batch, places={self.to: places}).to(device)
        dist = model(batch, heads=(self.to,), loss=False).heads[self.to].dist
        ids = dist.sample(torch.Generator(device), 0.0).cpu().numpy()
        spans = [row[(row >= span.first) & (row < span.stop)] - span.first for row in ids]
        raws = generator.tokenizer(self.to).decode([Encoded(s.astype(np.int32)) for s in spans])
        as_text = lambda raw: raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
        return [as_text(raw).split() for raw in raws]


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Insertions, deletions and substitutions between two lists of words."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
