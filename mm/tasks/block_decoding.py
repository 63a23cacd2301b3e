"""Block decoding: how many ids the further heads of `multi_token` save the model a forward for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.data.modalities.base import raw_modality
from mm.decoders.blockwise import decode_blocks
from mm.decoders.books import require_one_book
from mm.decoders.generate import Generator
from mm.decoders.score import evaluating
from mm.registry import TASKS
from mm.tasks.base import Figures, Task, open_split, spread
from mm.tasks.check import require_modalities, require_raw
from mm.vocabulary import Vocabulary


@TASKS.register("block_decoding")
class BlockDecoding(Task):
    """Mean ids a forward of greedy decoding by blocks, and whether it writes what greedy does."""

    kind: Literal["block_decoding"] = "block_decoding"
    data: Annotated[Path, Field(description="packed raw data")]
    split: Annotated[str, Field(description="split that prompts are from")] = "val"
    modality: Annotated[str, Field(description="of the model")] = "text"
    prompt: Annotated[int, Field(gt=0, description="ids of a prompt")] = 32
    written: Annotated[int, Field(gt=0, description="ids that are written")] = 64
    limit: Annotated[int, Field(gt=0, description="prompts at most, evenly spread")] = 32

    @property
    def about(self) -> str:
        return self.modality

    @classmethod
    def smallest(cls) -> BlockDecoding:
        return cls(data=Path("my_run/data"))

    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        require_modalities((self.modality,), vocabulary, tokenizers)
        require_raw(self.data, self.split, self.modality)

    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Ids a forward (1 = plain decoding), and the share of sequences equal to plain ones."""
        require_one_book(generator.model, self.modality, "task block_decoding")
        shards = open_split(self.data, self.split, generator.tokenizers)
        raw = raw_modality(self.modality).kind
        having = shards.having(raw)
        chosen = [int(having[k]) for k in spread(len(having), self.limit)]
        spans = generator.encode(self.modality, [shards.value(i, raw) for i in chosen])
        r = generator.vocabulary.range(self.modality)
        given = [np.append(r.begin, span[: self.prompt] + r.first) for span in spans]
        with evaluating(generator.model):
            made = decode_blocks(generator.model, generator.vocabulary, given, self.written)
            plain = decode_blocks(
                generator.model, generator.vocabulary, given, self.written, block=1
            )
        same = [np.array_equal(a, b) for a, b in zip(made.ids, plain.ids, strict=True)]
        return {
            f"{self.about}_ids_a_forward": self.written * len(given) / sum(made.forwards),
            f"{self.about}_ids_a_forward_chance": 1.0,
            f"{self.about}_same_as_greedy": float(np.mean(same)),
        }
