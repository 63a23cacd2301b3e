"""More layers that at first do nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mm.errors import UserError
from mm.model.layer import Linear
from mm.registry import SURGERIES
from mm.surgery.base import (
    LAYERS,
    Operated,
    Source,
    Surgery,
    assemble,
    empty_network,
    filled_module,
    move_layers,
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
        table: dict[str, Source] = {**move_layers(before.tensors, to)}
        first = {j: own[0] for own in to.values() for j in own[1:]}  # what a copy is one of
        source = {j: f"{LAYERS}{i}." for i, own in to.items() for j in own}
        old = empty_network(before.config, before.vocabulary)
        for j in first:
            layer = source[j].removesuffix(".")
            for path, part in old.get_submodule(layer).named_modules(prefix=layer):
                if isinstance(part, Linear) and part.ends_branch:
                    new = path.replace(source[j], f"{LAYERS}{j}.", 1)
                    for name in part.state_dict():
                        table[f"{new}.{name}"] = _zeros(old, path, before.tensors, name)
        return assemble(before, config, table)


def _zeros(
    network: nn.Module, path: str, tensors: Mapping[str, Tensor], name: str
) -> Callable[[], Tensor]:
    """What makes a tensor of a linear that gives zeros."""

    def make() -> Tensor:
        part = filled_module(network, path, tensors)
        part.rescale(0.0)
        return part.state_dict()[name]

    return make
