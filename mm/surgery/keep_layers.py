"""Some layers of a trained stack alone: what a student of distillation begins as."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mm.errors import UserError
from mm.registry import SURGERIES
from mm.surgery.base import Operated, Surgery, move_layers, select_tensors, stack_of, with_stack
from mm.vocabulary import Vocabulary


@SURGERIES.register("keep_layers")
class KeepLayers(Surgery):
    """The stack of the named layers, in their order.

    Source: Sanh et al. 2019, DistilBERT (arXiv:1910.01108), section 2: one layer out of two.
    """

    kind: Literal["keep_layers"] = "keep_layers"
    layers: Annotated[tuple[int, ...], Field(min_length=1, description="numbers from 0")] = (0,)

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        words = stack_of(before.config, self.kind).words()
        wrong = [i for i in self.layers if not 0 <= i < len(words)]
        if wrong or sorted(set(self.layers)) != list(self.layers):
            raise UserError(
                f"surgery 'keep_layers': layers {list(self.layers)} are no rising numbers of the "
                f"{len(words)} layers 0 to {len(words) - 1}"
            )
        config = with_stack(
            before.config, pattern=" ".join(words[i] for i in self.layers), depth=None
        )
        to = {i: [j] for j, i in enumerate(self.layers)}
        kept = select_tensors(before.tensors, move_layers(before.tensors, to))
        return Operated(config, kept, before.vocabulary)
