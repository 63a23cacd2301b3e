"""Recognition: whether the model writes the right class word for a held-out image or recording."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mm.data.modalities.base import get_modality, raw_modality
from mm.data.streams.shuffle import key_of
from mm.decoders.generate import Generator
from mm.registry import TASKS
from mm.tasks.base import (
    Figures,
    Item,
    Settings,
    chance,
    choose,
    conditions,
    confusion,
    first_class,
    read_items,
)
from mm.tasks.check import require_items, require_modalities
from mm.tasks.classes import ClassTask
from mm.vocabulary import Vocabulary


@TASKS.register("recognition")
class Recognition(ClassTask):
    """X to text: accuracy of the first class word that the model writes.

    An answer without one is wrong.
    """

    kind: Literal["recognition"] = "recognition"
    sources: Annotated[
        tuple[str, ...], Field(min_length=1, description="modalities that are given")
    ] = ("image",)
    to: Annotated[str, Field(description="modality of the answer")] = "text"
    settings: Annotated[
        tuple[Settings, ...], Field(min_length=1, description="more than one: chosen on val_split")
    ] = (Settings(temperature=0.0),)
    max_tokens: Annotated[int, Field(ge=1, description="ids of an answer at most")] = 32
    views: Annotated[
        int,
        Field(
            ge=1,
            description="also the most frequent answer to an item and its views - 1 varied copies "
            "(test-time augmentation)",
        ),
    ] = 1
    linear_probe: Annotated[
        bool, Field(description="also print logistic regression on raw pixels or numbers")
    ] = False
    probe_limit: Annotated[
        int | None, Field(ge=1, description="items that the linear probe learns from")
    ] = 5000

    @classmethod
    def smallest(cls) -> Recognition:
        return cls(data=Path("my_run/data"), sources=("image",), classes=("cat", "ship"))

    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Accuracy, chance (share of the commonest class), number of items and confusion matrix.

        See `Task.evaluate`.
        """
        items = self.items(self.split, generator)
        classes = self.classes or tuple(sorted({item.label for item in items}))
        settings = self.settings[0]
        tried: list[Figures] = []
        if len(self.settings) > 1:
            held_in = self.items(self.val_split, generator)
            score = lambda s: self._accuracy(
                held_in, self._answers(generator, held_in, classes, s, seed)
            )
            settings, tried = choose(self.settings, score)
        answers = self._answers(generator, items, classes, settings, seed)
        truth = [item.label for item in items]
        figures: Figures = {
            f"{self.about}_accuracy": self._accuracy(items, answers),
            f"{self.about}_chance": chance(truth, len(classes)),
            f"{self.about}_n": len(items),
            f"{self.about}_classes": list(classes),
            f"{self.about}_confusion": confusion(truth, answers, classes),
            f"{self.about}_settings": settings.to_dict(),
        }
        if self.views > 1:
            voted = self._voted(generator, items, answers, classes, settings, seed)
            figures[f"{self.about}_of_{self.views}_views_accuracy"] = self._accuracy(items, voted)
        if self.bar is not None:
            figures[f"{self.about}_bar"] = self.bar
        if tried:
            figures[f"{self.about}_tried_on_{self.val_split}"] = tried
        if self.linear_probe:
            from mm.tasks.judges import linear_probe

            train = read_items(
                self.data,
                self.train_split,
                (self._probed,),
                classes=self.classes,
                label=self.label,
                limit=self.probe_limit,
            )
            figures[f"{self.about}_linear_probe_accuracy"] = linear_probe(
                [item.sample.values[self._probed] for item in train],
                [item.label for item in train],
                [
                    get_modality(self._probed).view(item.sample.values[self._probed])
                    for item in items
                ],
                truth,
                self._probed,
            )
        return figures

    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        require_modalities((*self.sources, self.to), vocabulary, tokenizers)
        ask = lambda split, modalities, known: require_items(
            self.data, split, modalities, self.classes, self.label, known_only=known
        )
        ask(self.split, self.sources, True)
        if len(self.settings) > 1:
            ask(self.val_split, self.sources, False)
        if self.linear_probe:
            ask(self.train_split, (self._probed,), False)

    @property
    def _probed(self) -> str:
        """Raw modality that the linear probe reads: pictures, else what is given first."""
        kinds = [raw_modality(source).kind for source in self.sources]
        return "image" if "image" in kinds else kinds[0]

    def _answers(
        self,
        generator: Generator,
        items: Sequence[Item],
        classes: Sequence[str],
        settings: Settings,
        seed: int,
    ) -> list[str | None]:
        texts: list[Any] = generator.generate(
            [conditions(item, self.sources) for item in items],
            self.to,
            max_tokens=self.max_tokens,
            seed=seed,
            **settings.to_dict(),
        )
        as_text = lambda raw: raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
        return [first_class(as_text(raw), classes) for raw in texts]

    def _voted(
        self,
        generator: Generator,
        items: Sequence[Item],
        answers: Sequence[str | None],
        classes: Sequence[str],
        settings: Settings,
        seed: int,
    ) -> list[str | None]:
        """The most frequent of an item's ``answers`` and those to its copies; of equals the first.

        Source: Krizhevsky et al. 2012 (AlexNet), section 4.1, which averages over 10 patches.
        """
        asked = [answers]
        for number in range(1, self.views):
            copies = [self._copy(item, number, generator) for item in items]
            asked.append(self._answers(generator, copies, classes, settings, seed))
        ballots = [Counter(a for a in each if a is not None) for each in zip(*asked, strict=True)]
        return [next((a for a, _ in b.most_common(1)), None) for b in ballots]

    def _copy(self, item: Item, number: int, generator: Generator) -> Item:
        """The item with its sources varied as `mm data pack --copies` varies them."""
        values = dict(item.sample.values)
        for name in self.sources:
            modality = raw_modality(name)
            value = values[modality.kind]
            file = value if isinstance(value, bytes) else modality.file_of(value)
            key = key_of("view", f"{item.sample.key}~{number}", modality.kind)
            varied = modality.vary(file, key)
            values[modality.kind] = modality.read(varied, generator.tokenizers.get(name))
        return item._replace(sample=item.sample._replace(values=values))

    @staticmethod
    def _accuracy(items: Sequence[Item], answers: Sequence[str | None]) -> float:
        return sum(a == item.label for item, a in zip(items, answers, strict=True)) / len(items)
