"""Rows for new ids that begin as the mean of those that were trained. N ids, D model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mm.errors import UserError
from mm.registry import SURGERIES
from mm.surgery.base import Operated, Surgery, on_meta, replace_tensors, select_tensors
from mm.vocabulary import Vocabulary


@SURGERIES.register("extend_vocabulary")
class ExtendVocabulary(Surgery):
    """Every table of a row an id grows to the run's vocabulary, which begins with the old one.

    Without it new rows begin as in a fresh model, from the codes of their tokenizer. The mean keeps
    the model's own ids likely: a fresh row of the head may draw more than all of them.

    Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """

    kind: Literal["extend_vocabulary"] = "extend_vocabulary"

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        old = before.vocabulary
        if old is None or wanted is None or not old.is_prefix_of(wanted):
            raise UserError(
                "surgery 'extend_vocabulary': the run's vocabulary does not begin with the old; "
                "pack the data with: mm data pack SRC --out DIR --tokenizers ... --vocabulary OLD"
            )
        with torch.device("meta"):
            shapes = {k: t.shape for k, t in before.config.build(wanted).state_dict().items()}
        given = select_tensors(before.tensors, {name: name for name in before.tensors})
        longer: dict[int, Tensor] = {}  # ties stay
        made: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
        for name, t in on_meta(given).items():
            if t.dim() and (len(t), shapes[name][:1]) == (old.size, (wanted.size,)):
                meta = longer.setdefault(id(t), t.new_empty(wanted.size, *t.shape[1:]))
                made[name] = meta, lambda name=name: _extend(given[name], wanted.size)
        return Operated(before.config, replace_tensors(given, made), wanted)


def _extend(table: Tensor, n: int) -> Tensor:
    """`(N, D)` to `(n, D)`."""
    rows = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, rows.expand(n - len(table), *table.shape[1:])])
