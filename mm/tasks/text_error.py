"""Text error: how far what the model writes of an item is from the item's own text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mm.data.modalities.base import raw_modality
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.registry import TASKS
from mm.tasks.base import Figures, Item, Settings, Task, conditions, having, open_split, spread
from mm.tasks.check import require_modalities
from mm.vocabulary import Vocabulary


@TASKS.register("text_error")
class TextError(Task):
    """Word and character error rate of generated text: transcripts of recordings, captions."""

    kind: Literal["text_error"] = "text_error"
    data: Annotated[Path, Field(description="packed raw data")]
    split: Annotated[str, Field(description="split that is reported")] = "test"
    sources: Annotated[
        tuple[str, ...], Field(min_length=1, description="modalities that are given")
    ] = ("audio",)
    to: Annotated[str, Field(description="modality of the answer")] = "text"
    settings: Annotated[Settings, Field(description="of sampling")] = Settings(temperature=0.0)
    max_tokens: Annotated[int, Field(ge=1, description="ids of an answer at most")] = 128
    limit: Annotated[int | None, Field(ge=1, description="items at most, evenly spread")] = None

    @property
    def about(self) -> str:
        return f"{'_'.join(self.sources)}_to_{self.to}"

    @classmethod
    def smallest(cls) -> TextError:
        return cls(data=Path("my_run/data"))

    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        require_modalities((*self.sources, self.to), vocabulary, tokenizers)
        if not having(open_split(self.data, self.split), (*self.sources, self.to)):
            raise UserError(
                f"{self.data}: no sample of split '{self.split}' has "
                f"{' and '.join((*self.sources, self.to))}"
            )

    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Edits a word and a character of the references, and the share of answers without any.

        Case and the spaces at both ends do not count. No chance level: saying nothing errs by 1.
        """
        from torchmetrics.functional.text import char_error_rate, word_error_rate

        shards = open_split(self.data, self.split, generator.tokenizers)
        found = having(shards, (*self.sources, self.to))
        items = [Item(shards[found[k]], "") for k in spread(len(found), self.limit)]
        answers: list[Any] = generator.generate(
            [conditions(item, self.sources) for item in items],
            self.to,
            max_tokens=self.max_tokens,
            seed=seed,
            **self.settings.to_dict(),
        )
        kind = raw_modality(self.to).kind
        told = [_plain(answer) for answer in answers]
        truth = [_plain(item.sample.values[kind]) for item in items]
        return {
            f"{self.about}_word_error_rate": float(word_error_rate(told, truth)),
            f"{self.about}_character_error_rate": float(char_error_rate(told, truth)),
            f"{self.about}_exact_share": sum(map(str.__eq__, told, truth)) / len(truth),
            f"{self.about}_n": len(truth),
        }


def _plain(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return " ".join(text.lower().split())
