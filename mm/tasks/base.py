"""Task: a figure on held-out data with its chance level beside it.

And what the tasks share (items, labels, settings).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.data.modalities.base import raw_modality
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.specs import NONE, Sample
from mm.vocabulary import Vocabulary

Figures = dict[str, Any]


class Task(Config):
    """Plug point: evaluation.

    A Config that names its shards and split; `build` returns itself, ready to evaluate.
    """

    name: Annotated[
        str,
        Field(
            pattern=r"^[\w.-]*$",
            description="what its figures are called: `eval/<name>/<figure>`; default: its kind, "
            "modalities and data folder, such as recognition_image_to_text_digits",
        ),
    ] = ""
    every: Annotated[
        int,
        Field(
            ge=0,
            description="steps between two evaluations of the weights that train; 0 = only of what "
            "the stage leaves",
        ),
    ] = 0

    @property
    def about(self) -> str:
        """The modalities that it measures, for its default name."""
        return ""

    @property
    def full_name(self) -> str:
        """Its `name`, or the default one."""
        data = getattr(self, "data", None)
        parts = (str(getattr(self, "kind", "")), self.about, Path(data).name if data else "")
        return self.name or re.sub(r"[^\w.-]+", "-", "_".join(filter(None, parts)))

    def build(self) -> Task:
        return self

    @abstractmethod
    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        """Raise UserError for what `evaluate` would miss or refuse: asked before a run trains.

        Args:
            vocabulary: of the run.
            tokenizers: of the run, by modality.
        """

    @abstractmethod
    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Measure. Every accuracy or rate stands beside its ``..._chance``.

        Args:
            generator: model, vocabulary and tokenizers.
            seed: of whatever is sampled; the same seed gives the same figures.
        """


def by_name(tasks: Sequence[Task]) -> dict[str, Task]:
    """Tasks by `Task.full_name`; the second of one name is called name_2."""
    found: dict[str, Task] = {}
    for task in tasks:
        name, n = task.full_name, 1
        while name in found:
            n += 1
            name = f"{task.full_name}_{n}"
        found[name] = task
    return found


class Settings(Config):
    """Sampling settings that may be chosen on a validation split."""

    temperature: Annotated[float, Field(description="of sampling; 0 = greedy")] = 1.0
    top_k: Annotated[int, Field(description="keep the k likeliest ids; 0 = off")] = 0
    top_p: Annotated[
        float, Field(description="keep the likeliest ids up to this probability; 1 = off")
    ] = 1.0
    cfg_scale: Annotated[float, Field(description="classifier-free guidance; 1 = off")] = 1.0
    repeats: Annotated[int, Field(description="times that the conditions are read")] = 1


class Item(NamedTuple):
    """One raw sample and its class."""

    sample: Sample
    label: str


def open_split(data: Path, split: str, tokenizers: Mapping[str, Any] = NONE) -> Any:
    """Open the shards of one split. Raises UserError when it is absent.

    Args:
        data: packed data.
        split: of it.
        tokenizers: that will read the values; one of bytes gets the files as they are.
    """
    from mm.data.shards.reader import ShardSet

    shards = ShardSet.open(data, split=split)
    shards.tokenizers = tokenizers
    return shards


def spread(n: int, limit: int | None) -> list[int]:
    """At most ``limit`` of 0..n-1, evenly spread (so that shards sorted by class stay balanced)."""
    if limit is None or n <= limit:
        return list(range(n))
    return [int(i) for i in np.linspace(0, n - 1, limit).round()]


def read_items(
    data: Path,
    split: str,
    modalities: Sequence[str],
    *,
    classes: Sequence[str] = (),
    label: str = "label",
    limit: int | None = None,
    tokenizers: Mapping[str, Any] = NONE,
) -> list[Item]:
    """Labelled samples of a split that hold all of ``modalities``.

    The class is the metadata value ``label`` (a number is a place in ``classes``), else the class
    word of the caption. ``tokenizers`` are as of `open_split`.

    Raises:
        UserError: no sample of this split has these modalities and a class.
    """
    shards = open_split(data, split, tokenizers)
    found = []
    for i in having(shards, modalities):
        name = label_of(shards, i, classes, label)
        if name is not None:
            found.append((i, name))
    if not found:
        raise UserError(
            f"{data}: no sample of split '{split}' has {' and '.join(modalities)} and a class; "
            f"give the class words in 'classes' or a column '{label}' to: mm data pack"
        )
    # Only what is kept is decoded.
    return [Item(shards[found[k][0]], found[k][1]) for k in spread(len(found), limit)]


def having(shards: Any, modalities: Sequence[str]) -> list[int]:
    """Samples of raw shards with values that all of these token modalities are made from."""
    kinds = [raw_modality(m).kind for m in modalities]
    some = shards.having(kinds[0]).tolist()
    return [i for i in some if all(shards.lengths(kind)[i] >= 0 for kind in kinds)]


def label_of(shards: Any, i: int, classes: Sequence[str], label: str = "label") -> str | None:
    """Class of sample ``i``: its metadata, else the first class word in its caption, else None."""
    value = shards.meta(i).get(label)
    if isinstance(value, int) and not isinstance(value, bool):
        return classes[value] if 0 <= value < len(classes) else str(value)
    if isinstance(value, str):
        return value
    caption = shards.raw(i, "text") if classes else None
    return first_class(caption[1].decode("utf-8", "replace"), classes) if caption else None


def first_class(text: str, classes: Sequence[str]) -> str | None:
    """The class that occurs first as a whole word in ``text``, whatever its case.

    The longer one of two at one place.
    """
    if not classes:
        return None
    words = sorted(classes, key=len, reverse=True)
    match = re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", text, re.IGNORECASE)
    if match is None:
        return None
    return next(word for word in words if word.lower() == match.group(0).lower())


def chance(labels: Sequence[str], n_classes: int) -> float:
    """Accuracy of the best answer that looks at nothing.

    The share of the commonest class, at least 1 / n_classes.
    """
    return max(max(Counter(labels).values()) / len(labels), 1 / n_classes)


def confusion(
    truth: Sequence[str], answer: Sequence[str | None], classes: Sequence[str]
) -> list[list[int]]:
    """Counts `(C, C + 1)`.

    Row = true class, column = answered class, the last column = none of them.
    """
    place = {name: i for i, name in enumerate(classes)}
    table = np.zeros((len(classes), len(classes) + 1), int)
    for t, a in zip(truth, answer, strict=True):
        table[place[t], place.get(a, len(classes)) if a is not None else len(classes)] += 1
    return table.tolist()


def choose(grid: Sequence[Settings], score: Any) -> tuple[Settings, list[Figures]]:
    """The settings with the best score; the earlier one of two equals.

    Args:
        grid: candidates.
        score: Settings -> accuracy, measured on a VALIDATION split (never on the one that is
            reported).
    Returns:
        The chosen settings, and every candidate with its score.
    """
    if len(grid) == 1:
        return grid[0], []
    tried = [{**settings.to_dict(), "accuracy": float(score(settings))} for settings in grid]
    best = max(range(len(grid)), key=lambda i: (tried[i]["accuracy"], -i))
    return grid[best], tried


def conditions(item: Item, sources: Sequence[str]) -> Mapping[str, Any]:
    """The prompt of an item: token modality -> raw value that it is made from, in that order."""
    return {m: item.sample.values[raw_modality(m).kind] for m in sources}
