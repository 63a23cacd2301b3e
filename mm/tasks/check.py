"""What a task needs, asked for before a run trains: `Task.check` of the tasks is made of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.data.modalities.base import raw_modality
from mm.errors import UserError, did_you_mean
from mm.tasks.base import having, label_of, open_split, spread
from mm.vocabulary import Vocabulary

LOOKED_AT = 2000  # samples of a split whose class is read at once; all where these have none


def require_modalities(
    modalities: Iterable[str], vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]
) -> None:
    """Check that a model of this run can read and write these modalities. Raises UserError."""
    known = vocabulary.modalities if vocabulary is not None else ()
    for modality in modalities:
        if modality not in known:
            raise UserError(
                f"the vocabulary has no modality '{modality}'{did_you_mean(modality, known)}"
            )
        if modality not in tokenizers:
            raise UserError(f"no tokenizer of '{modality}': set tokenizers.{modality}")


def require_raw(data: Path, split: str, modality: str) -> None:
    """Check that a split has raw samples of what ``modality`` is made of. Raises UserError."""
    raw = raw_modality(modality).kind
    if not len(open_split(data, split).having(raw)):
        raise UserError(f"{data}: no sample of split '{split}' has '{raw}'")


def require_items(
    data: Path,
    split: str,
    modalities: Sequence[str],
    classes: Sequence[str],
    label: str,
    *,
    n_classes: int = 1,
    known_only: bool = True,
) -> None:
    """Check that a split has labelled samples as `mm.tasks.base.read_items` would read them.

    Args:
        n_classes: different classes that there must be.
        known_only: every label must be one of ``classes``, if those are given.
    Raises:
        UserError: naming the split and what it lacks.
    """
    shards = open_split(data, split)
    have = having(shards, modalities)
    found: set[str] = set()
    for numbers in ([have[k] for k in spread(len(have), LOOKED_AT)], have):
        labels = (label_of(shards, i, classes, label) for i in numbers)
        found = {name for name in labels if name is not None}
        if len(found) >= n_classes:
            break
    if not found:
        raise UserError(
            f"{data}: no sample of split '{split}' has {' and '.join(modalities)} and a class; "
            f"give the class words in 'classes' or a column '{label}' to: mm data pack"
        )
    if len(found) < n_classes:
        raise UserError(
            f"{data}: split '{split}' has the one class {min(found)}; a judge needs two: set "
            "judge_data to data with more"
        )
    unknown = found - set(classes)
    if classes and known_only and unknown:
        raise UserError(
            f"{data}: split '{split}' has the class '{min(unknown)}', which is not in classes: "
            f"{', '.join(classes)}; add it, or leave classes out"
        )
