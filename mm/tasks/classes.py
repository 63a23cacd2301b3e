"""Task with classes: every held-out item has one.

Sampling may be chosen on a split of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mm.decoders.generate import Generator
from mm.tasks.base import Item, Settings, Task, read_items


class ClassTask(Task):
    """What is given, the data with their classes, and the answer's modality ``to``."""

    data: Annotated[Path, Field(description="packed raw data that is measured on")]
    sources: Annotated[
        tuple[str, ...], Field(min_length=1, description="modalities that are given")
    ]
    to: Annotated[str, Field(description="modality of the answer")]
    split: Annotated[str, Field(description="split that is reported")] = "test"
    val_split: Annotated[str, Field(description="split on which `settings` are chosen")] = "val"
    train_split: Annotated[str, Field(description="split that judge or probe learns from")] = (
        "train"
    )
    classes: Annotated[
        tuple[str, ...], Field(description="class words; default: the labels of the split")
    ] = ()
    label: Annotated[
        str, Field(description="metadata column of the class; else the caption's class word")
    ] = "label"
    limit: Annotated[int | None, Field(ge=1, description="items at most, evenly spread")] = None
    settings: Annotated[
        tuple[Settings, ...], Field(min_length=1, description="more than one: chosen on val_split")
    ] = (Settings(),)
    bar: Annotated[float | None, Field(description="accuracy to reach; printed beside")] = None

    @property
    def about(self) -> str:
        return f"{'_'.join(self.sources)}_to_{self.to}"

    def items(self, split: str, generator: Generator) -> list[Item]:
        """Labelled items of a split that hold all of ``sources``. Raises as `read_items`."""
        return read_items(
            self.data,
            split,
            self.sources,
            classes=self.classes,
            label=self.label,
            limit=self.limit,
            tokenizers=generator.tokenizers,
        )
