"""Judged generation.

Is what the model draws or says for a held-out condition recognised by a classifier of real data?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mm.data.modalities.base import get_modality
from mm.decoders.base import is_fixed
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.registry import TASKS
from mm.tasks.base import (
    Figures,
    Item,
    Settings,
    chance,
    choose,
    conditions,
    confusion,
    read_items,
)
from mm.tasks.check import require_items, require_modalities
from mm.tasks.classes import ClassTask
from mm.tasks.judges import Judge
from mm.vocabulary import Vocabulary

UNREADABLE = "unreadable"


def trained_judge(
    data: Path, split: str, modality: str, classes: tuple[str, ...], label: str, limit: int | None
) -> Judge:
    """A judge of ``modality`` trained on the real items of one split; trained once a process."""
    manifest = data / "manifest.json"
    made = manifest.stat().st_mtime_ns if manifest.is_file() else 0  # packed again: another judge
    return _trained_judge(data, made, split, modality, classes, label, limit)


@lru_cache(maxsize=8)
def _trained_judge(
    data: Path,
    made: int,
    split: str,
    modality: str,
    classes: tuple[str, ...],
    label: str,
    limit: int | None,
) -> Judge:
    items = read_items(data, split, (modality,), classes=classes, label=label, limit=limit)
    return Judge(modality).fit(
        [item.sample.values[modality] for item in items], [item.label for item in items]
    )


@TASKS.register("judged_generation")
class JudgedGeneration(ClassTask):
    """X to image or audio: share of generations that a judge puts into the condition's class.

    The judge sees only real training-split data; its own accuracy on real held-out data stands
    beside, as the ceiling.
    """

    kind: Literal["judged_generation"] = "judged_generation"
    judge_data: Annotated[
        Path | None, Field(description="shards with real items of modality `to`; default: data")
    ] = None
    sources: Annotated[
        tuple[str, ...], Field(min_length=1, description="modalities that are given")
    ] = ("text",)
    to: Annotated[str, Field(description="modality that is generated and judged")] = "image"
    judge_limit: Annotated[
        int | None, Field(ge=1, description="real items that the judge learns from")
    ] = 4000
    settings: Annotated[
        tuple[Settings, ...], Field(min_length=1, description="more than one: chosen on val_split")
    ] = (Settings(temperature=0.7, cfg_scale=2.0),)
    reconstruction_bar: Annotated[
        float | None, Field(description="accuracy of round trips to reach; printed beside")
    ] = None
    max_tokens: Annotated[
        int | None, Field(ge=1, description="of audio; an image has its grid")
    ] = None
    reconstruction: Annotated[
        bool, Field(description="also judge tokenizer round trips of real held-out items")
    ] = True

    @field_validator("to")
    @classmethod
    def _has_a_judge(cls, value: str) -> str:
        try:
            get_modality(value).features()
        except UserError as error:
            raise ValueError(str(error)) from error
        return value

    @classmethod
    def smallest(cls) -> JudgedGeneration:
        return cls(data=Path("my_run/data"), to="image", classes=("cat", "ship"))

    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Judged accuracy, chance, the judge on real and on re-synthesised held-out items.

        See `Task.evaluate`.
        """
        where = self.judge_data or self.data
        judge = trained_judge(
            where, self.train_split, self.to, self.classes, self.label, self.judge_limit
        )
        real = read_items(
            where, self.split, (self.to,), classes=self.classes, label=self.label, limit=self.limit
        )
        settings, tried = self.settings[0], []
        if len(self.settings) > 1:
            held_in = self.items(self.val_split, generator)
            score = lambda s: _right(
                held_in, self._judged(judge, self._make(generator, held_in, s, seed))
            )
            settings, tried = choose(self.settings, score)
        items = self.items(self.split, generator)
        answers = self._judged(judge, self._make(generator, items, settings, seed))
        truth = [item.label for item in items]
        classes = sorted(set(truth) | set(answers) | set(self.classes))
        originals = [item.sample.values[self.to] for item in real]
        figures: Figures = {
            f"{self.about}_accuracy": _right(items, answers),
            f"{self.about}_chance": chance(truth, len(classes)),
            f"{self.about}_n": len(items),
            f"{self.about}_judge_on_real_accuracy": _right(real, judge.predict(originals)),
            f"{self.about}_classes": classes,
            f"{self.about}_confusion": confusion(truth, answers, classes),
            f"{self.about}_settings": settings.to_dict(),
        }
        if self.bar is not None:
            figures[f"{self.about}_bar"] = self.bar
        if tried:
            figures[f"{self.about}_tried_on_{self.val_split}"] = tried
        if self.reconstruction:
            again = generator.decode(self.to, generator.encode(self.to, originals))
            figures[f"{self.about}_judge_on_reconstruction_accuracy"] = _right(
                real, self._judged(judge, again)
            )
            if self.reconstruction_bar is not None:
                figures[f"{self.about}_judge_on_reconstruction_bar"] = self.reconstruction_bar
        return figures

    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        require_modalities((*self.sources, self.to), vocabulary, tokenizers)
        where, own = self.judge_data or self.data, (self.classes, self.label)
        require_items(where, self.train_split, (self.to,), *own, n_classes=2, known_only=False)
        require_items(where, self.split, (self.to,), *own, known_only=False)
        require_items(self.data, self.split, self.sources, *own, known_only=False)
        if len(self.settings) > 1:
            require_items(self.data, self.val_split, self.sources, *own, known_only=False)

    def _judged(self, judge: Judge, made: Sequence[Any]) -> list[str]:
        """Class of each; a file that a model of bytes wrote and nobody can read has none."""
        seen = [get_modality(self.to).view(value) for value in made]
        good = [value for value in seen if not isinstance(value, str)]
        classes = iter(judge.predict(good) if good else [])
        return [UNREADABLE if isinstance(value, str) else next(classes) for value in seen]

    def _make(
        self, generator: Generator, items: Sequence[Item], settings: Settings, seed: int
    ) -> list[Any]:
        # What has a grid, such as an image, takes no length limit.
        free = not is_fixed(generator.tokenizer(self.to).spec)
        limit = {"max_tokens": self.max_tokens} if free and self.max_tokens else {}
        prompts = [conditions(item, self.sources) for item in items]
        return generator.generate(prompts, self.to, seed=seed, **limit, **settings.to_dict())


def reconstruction_judged(
    generator: Generator,
    data: Path,
    modality: str,
    *,
    split: str = "test",
    train_split: str = "train",
    classes: tuple[str, ...] = (),
    label: str = "label",
    limit: int | None = None,
) -> Figures:
    """Judge tokenizer round trips of real held-out items: how much of the class survives the codes.

    Returns:
        ``{modality}_reconstruction_judged_accuracy``, ``..._judge_on_real_accuracy`` and
        ``..._chance``.
    """
    judge = trained_judge(data, train_split, modality, classes, label, None)
    items = read_items(data, split, (modality,), classes=classes, label=label, limit=limit)
    originals = [item.sample.values[modality] for item in items]
    again = generator.decode(modality, generator.encode(modality, originals))
    truth = [item.label for item in items]
    return {
        f"{modality}_reconstruction_judged_accuracy": _right(items, judge.predict(again)),
        f"{modality}_reconstruction_judge_on_real_accuracy": _right(
            items, judge.predict(originals)
        ),
        f"{modality}_reconstruction_chance": chance(truth, len(set(truth))),
        f"{modality}_reconstruction_n": len(items),
    }


def _right(items: Sequence[Item], answers: Sequence[str]) -> float:
    return sum(a == item.label for item, a in zip(items, answers, strict=True)) / len(items)
