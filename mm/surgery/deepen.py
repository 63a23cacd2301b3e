"""More layers that at first do nothing."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from mm.errors import UserError
from mm.model.layer import Linear
from mm.registry import SURGERIES
from mm.surgery.base import (
    LAYERS,
    Operated,
    Surgery,
    move_layers,
    network_of,
    own_tensors,
    stack_of,
    with_stack,
)
from mm.vocabulary import Vocabulary


@SURGERIES.register("deepen")
class Deepen(Surgery):
    """Every layer ``times`` times: itself, then copies whose branches end in zeros.

    The copies are the identity until they learn; the model afterwards has the pattern with each
    word repeated.

    Source: Wu et al. 2024, LLaMA Pro (arXiv:2401.02415), section 3.
    """

    kind: Literal["deepen"] = "deepen"
    times: Annotated[int, Field(ge=2, le=64)] = 2

    keeps_function: ClassVar[bool] = True

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        stack = stack_of(before.config, self.kind)
        blocks = [stack.block, *stack.blocks.values()]
        if any(getattr(block, "normed_residual", False) for block in blocks):
            raise UserError("surgery 'deepen': with normed_residual no layer is the identity")
        words, n = stack.words(), self.times
        pattern = " ".join(word for word in words for _ in range(n))
        to = {i: list(range(n * i, n * i + n)) for i in range(len(words))}
        config = with_stack(before.config, pattern=pattern, depth=None)
        module = network_of(Operated(config, move_layers(before.tensors, to), before.vocabulary))
        copies = tuple(f"{LAYERS}{j}." for own in to.values() for j in own[1:])
        with torch.no_grad():
            for path, part in module.named_modules():
                if isinstance(part, Linear) and part.ends_branch and path.startswith(copies):
                    part.rescale(0.0)
        return Operated(config, own_tensors(module), before.vocabulary)
