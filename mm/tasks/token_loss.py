"""Token loss: how well the model predicts what is learnt of held-out token shards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mm.data.chat.loss import sample_segments
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.registry import TASKS
from mm.tasks.base import Figures, Task, open_split, spread
from mm.vocabulary import Vocabulary


@TASKS.register("token_loss")
class TokenLoss(Task):
    """Perplexity of the tokens that the shards say are learnt: of conversations, the answers."""

    kind: Literal["token_loss"] = "token_loss"
    data: Annotated[Path, Field(description="token shards")]
    split: Annotated[str, Field(description="split that is reported")] = "val"
    limit: Annotated[int | None, Field(ge=1, description="samples at most, evenly spread")] = None

    @classmethod
    def smallest(cls) -> TokenLoss:
        return cls(data=Path("my_run/tokens"))

    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        shards = open_split(self.data, self.split)
        if not shards.tokenized:
            raise UserError(f"{self.data}: raw shards; task token_loss reads token shards")
        if vocabulary is not None:
            vocabulary.require(shards.specs, str(self.data))

    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Perplexity by modality, beside that of ids that are equally likely; nothing is sampled.

        The shards' own vocabulary must be the model's, see `check`.
        """
        shards = open_split(self.data, self.split)
        vocabulary = generator.vocabulary
        some = spread(len(shards), self.limit)
        scores = generator.nll([sample_segments(shards, i, vocabulary) for i in some])
        figures: Figures = {}
        for modality in dict.fromkeys(m for score in scores for m in score):
            mine = [score[modality] for score in scores if modality in score]
            nats, places = sum(s[0] for s in mine), sum(s[1] for s in mine)
            spec, name = vocabulary.spec(modality), f"{modality}_perplexity"
            figures |= {name: math.exp(min(700.0, nats / places)), f"{name}_n": places}
            if not spec.continuous:  # of which the end of the span alone is an id
                figures[f"{name}_chance"] = float(spec.vocab_size + 1)  # or the span's end
        return figures
