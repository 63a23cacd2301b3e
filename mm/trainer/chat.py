"""Conversations in a run: one template for all of it, saved with it, and a gate before step 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.chat.choose import template_beside, template_of
from mm.data.chat.gate import Gate, require_one_template
from mm.data.chat.template import FILE, ChatTemplate
from mm.data.modalities.base import table
from mm.data.shards.reader import ShardSet
from mm.errors import UserError
from mm.run import Run
from mm.trainer.callbacks.base import Training

LOOKED_AT = 64  # samples of a source, spread over it


def conversations(data: Any) -> Iterator[tuple[int, str, ShardSet]]:
    """(number, path, shards) of every source of a stream that holds conversations."""
    for number, source in enumerate(getattr(data, "token_sources", ())):
        shards = source.build()
        if shards.says_loss:
            yield number, str(source.path), shards


def read_template(path: str, shards: ShardSet) -> ChatTemplate:
    """The template that shards were packed with. Raises UserError where it is gone."""
    found = ChatTemplate.load(shards.small_file(FILE).parent)
    if found is None:
        raise UserError(
            f"{path}: {FILE} is gone, the template of its conversations; restore it or pack again: "
            f"mm data pack SRC --out {path} --overwrite"
        )
    return found


def text_tokenizer(trainer: Training) -> Any:
    """The run's tokenizer of text. Raises UserError without one: nobody could ask the model."""
    for modality, tokenizer in trainer.tokenizers.items():
        if table().raw.get(modality) == "text":
            return tokenizer
    raise UserError(
        "conversations need the tokenizer of text that they were packed with, to be checked and "
        "served: set tokenizers.text=DIR"
    )


def check_templates(trainer: Training, index: int) -> None:
    """Refuse a run whose conversations a server would write otherwise.

    Args:
        index: of the first stage that will train.
    Raises:
        UserError: naming both places and what mends it.
    """
    run = trainer.run
    found = [
        (f"stages.{number}.data at {path}", read_template(path, shards))
        for number in range(index, len(run.stages))
        for _, path, shards in conversations(run.stages[number].data)
    ]
    if not found:
        return
    tokenizer = text_tokenizer(trainer)
    mend = "pack again with one of them: mm data pack SRC --out DIR --template FILE --overwrite"
    try:
        require_one_template(found)
        own = template_beside(tokenizer)
        if own and own != found[0][1].source:
            name = f"the tokenizer at {run.tokenizers[tokenizer.spec.modality]}"
            mend = "pack again without --template, or put that template into the tokenizer's folder"
            require_one_template([found[0], (name, template_of(tokenizer))])
    except UserError as error:
        raise UserError(f"{error}; {mend}") from error


def check_loss(key: str, trainer: Training, stream: Any) -> None:
    """Refuse a stage whose loss is not on what the assistant says, after all transforms.

    Args:
        key: of the stage, for messages.
        stream: of the stage.
    Raises:
        UserError: naming the sample, what is wrong and the key that mends it.
    """
    vocabulary = trainer.vocabulary
    if vocabulary is None or not hasattr(stream, "apply_transforms"):
        return
    for number, path, shards in conversations(stream.config):
        every = shards.manifest["settings"]["chat"]["loss"] == "all"
        gate = Gate(read_template(path, shards), text_tokenizer(trainer), vocabulary, every)
        for i in np.unique(np.linspace(0, len(shards) - 1, LOOKED_AT).astype(int)).tolist():
            made = stream.apply_transforms(number, stream.segments(number, i), number, 0, i)
            if made and (fault := gate.fault(made)):
                raise UserError(
                    f"{key}.data: sample '{shards.key(i)}' of {path}: {fault}; look at it: mm data "
                    f"inspect {path} --loss --sample {i} --tokenizers DIR; mend {key}.data."
                    f"transform and {key}.objective.transform, or pack again: mm data pack SRC "
                    f"--out {path} --overwrite"
                )


def save_template(run: Run, folder: Path) -> None:
    """Write the template of the run's conversations, else of what it begins from, to ``folder``."""
    for stage in reversed(run.stages):
        for _, path, shards in conversations(stage.data):
            read_template(path, shards).save(folder)
            return
    if run.init_from is not None:  # which may be gone where the run is resumed
        for place in (run.init_from.path / "model", run.init_from.path):
            if (before := ChatTemplate.load(place)) is not None:
                before.save(folder)
                return
