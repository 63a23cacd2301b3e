"""Retrieval: whether a held-out item's own class name is the nearest of all names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from mm.data.batching.document import of_array
from mm.decoders.books import documents_batch
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.registry import TASKS
from mm.tasks.base import Figures, Task, chance, read_items
from mm.tasks.check import require_items, require_modalities
from mm.vocabulary import Vocabulary


@TASKS.register("retrieval")
class Retrieval(Task):
    """Recall at 1 of items among class names, by the products of a head `embedding`."""

    kind: Literal["retrieval"] = "retrieval"
    data: Annotated[Path, Field(description="packed raw data")]
    split: Annotated[str, Field(description="split that is reported")] = "test"
    classes: Annotated[
        tuple[str, ...], Field(description="names; default: the labels of the split")
    ] = ()
    label: Annotated[
        str, Field(description="metadata column of the class; else the caption's class word")
    ] = "label"
    limit: Annotated[int | None, Field(ge=1, description="items at most, evenly spread")] = None
    source: Annotated[str, Field(description="modality of the items")] = "image"
    to: Annotated[str, Field(description="modality of the names")] = "text"
    head: Annotated[str, Field(description="of the model, of kind embedding")] = "embedding"
    rows: Annotated[int, Field(gt=0, description="documents of one forward")] = 64

    @property
    def about(self) -> str:
        return f"{self.source}_to_{self.to}"

    @classmethod
    def smallest(cls) -> Retrieval:
        return cls(data=Path("my_run/data"), classes=("cat", "ship"))

    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        require_modalities((self.source, self.to), vocabulary, tokenizers)
        require_items(self.data, self.split, (self.source,), self.classes, self.label)

    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Recall at 1, its chance (share of the commonest class) and the number of items."""
        model: Any = generator.model
        if self.head not in model.heads:
            raise UserError(f"task retrieval: model.heads has no '{self.head}'")
        items = read_items(
            self.data,
            self.split,
            (self.source,),
            classes=self.classes,
            label=self.label,
            limit=self.limit,
            tokenizers=generator.tokenizers,
        )
        classes = self.classes or tuple(sorted({item.label for item in items}))
        names = self._vectors(generator, self.to, list(classes))
        raws = [item.sample.values[self.source] for item in items]
        told = (self._vectors(generator, self.source, raws) @ names.T).argmax(1)
        truth = [item.label for item in items]
        right = [classes[k] == t for k, t in zip(told.tolist(), truth, strict=True)]
        return {
            f"{self.about}_recall_at_1": float(np.mean(right)),
            f"{self.about}_chance": chance(truth, len(classes)),
            f"{self.about}_n": len(items),
        }

    @torch.no_grad()
    def _vectors(self, generator: Generator, modality: str, raws: Sequence[Any]) -> torch.Tensor:
        """`(N, E)` on the CPU."""
        model: Any = generator.model
        device = next(model.parameters()).device
        spec = generator.vocabulary.spec(modality)
        found = []
        for at in range(0, len(raws), self.rows):
            codes = generator.encode(modality, raws[at : at + self.rows])
            rows = [[of_array(spec, code)._replace(role="condition")] for code in codes]
            batch = documents_batch(model, generator.vocabulary, rows)
            starts = batch.layout.cu_seqlens[:-1]
            sizes = (batch.layout.fields.document > 0).sum(1).to(torch.int32)
            batch = replace(batch, places={self.head: starts + sizes - 1}).to(device)
            out = model(batch, heads=(self.head,), loss=False)
            found.append(out.heads[self.head].dist.mean.float().cpu())
        return torch.cat(found)
