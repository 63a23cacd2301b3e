"""Feed-forwards of nested widths as ordinary ones of a chosen width."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mm.errors import UserError
from mm.model.ffn.nested import Nested, NestedConfig, NestedMatrix
from mm.registry import SURGERIES
from mm.surgery.base import (
    LAYERS,
    Operated,
    Source,
    Surgery,
    assemble,
    empty_network,
    filled_module,
    stack_of,
    with_stack,
)
from mm.vocabulary import Vocabulary

Width = Annotated[int, Field(gt=0)]


@SURGERIES.register("slice_nested")
class SliceNested(Surgery):
    """Every `nested` layer becomes the `swiglu` or `mlp` of its first hidden units.

    It computes, bit by bit, what the model did with ``eval_hidden`` of those widths.

    Source: Devvrit et al. 2023, MatFormer (arXiv:2310.07707), section 3.3, Mix'n'Match.
    """

    kind: Literal["slice_nested"] = "slice_nested"
    hidden: Annotated[
        Width | tuple[Width, ...] | None,
        Field(description="units of all, or of each nested layer from below; default: eval_hidden"),
    ] = None

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        stack = stack_of(before.config, self.kind)
        module = empty_network(before.config, before.vocabulary)
        layers = {path: m for path, m in module.named_modules() if isinstance(m, Nested)}
        table: dict[str, Source] = {name: name for name in before.tensors}
        cut = {}  # layer -> its feed-forward
        words = stack.words()
        for (path, layer), n in zip(layers.items(), self._widths(layers), strict=True):
            at = int(path.removeprefix(LAYERS).split(".")[0])
            cut[at] = _alone(stack.ffns.get(words[at], stack.ffn), n)
            for name, matrix in layer.named_children():
                assert isinstance(matrix, NestedMatrix)  # `_widths` saw to it
                reads, units = (n, None) if name == "out" else (matrix.weight.shape[1], n)
                place = f"{path}.{name}"
                for i, kind in enumerate(("weight", "bias")):
                    if matrix.part(reads, units)[i] is not None:
                        part = module, place, before.tensors
                        table[f"{place}.{kind}"] = lambda part=part, r=reads, u=units, i=i: (
                            filled_module(*part).part(r, u)[i]
                        )
        config = with_stack(before.config, **_by_word(stack, cut))
        return assemble(before, config, table)

    def _widths(self, layers: dict[str, Nested]) -> list[int]:
        """Units of each layer. Raises UserError where they cannot be cut so."""
        if not layers:
            raise UserError("surgery 'slice_nested': this model has no `nested` feed-forward")
        if self.hidden is None:
            widths = [layer.eval_hidden for layer in layers.values()]
        elif isinstance(self.hidden, int):
            widths = [self.hidden] * len(layers)
        else:
            widths = [*self.hidden]
        if len(widths) != len(layers):
            raise UserError(
                f"surgery 'slice_nested': {len(widths)} widths for {len(layers)} nested layers"
            )
        for (path, layer), n in zip(layers.items(), widths, strict=True):
            if n > layer.widths[-1]:
                raise UserError(
                    f"surgery 'slice_nested': {path} has {layer.widths[-1]} hidden units, not {n}"
                )
            if not all(isinstance(m, NestedMatrix) for m in layer.children()):
                raise UserError(
                    f"surgery 'slice_nested': {path} is no layer of dense matrices; of adapters "
                    "make such by merge_lora before"
                )
        return widths


def _alone(config: NestedConfig, n: int) -> dict[str, Any]:
    """The feed-forward of ``n`` units by the name that other formats know it by."""
    if config.gated and config.activation in ("silu", "gelu_tanh"):
        return {"kind": "swiglu", "hidden": n, "activation": config.activation}
    return {"kind": "mlp", "hidden": n, "activation": config.activation, "gated": config.gated}


def _by_word(stack: Any, cut: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Settings of the stack with these feed-forwards; a word of two widths becomes two words."""
    words = stack.words()
    mixers = {word: m.to_dict() for word, m in stack.mixers.items()}
    blocks = {word: b.to_dict() for word, b in stack.blocks.items()}
    ffns: dict[str, Any] = {}
    for at, word in enumerate(words):
        ffn = stack.ffns.get(word, stack.ffn)
        made = cut.get(at, ffn and ffn.to_dict())
        if ffns.setdefault(word, made) != made:
            words[at] = f"{word}_{cut[at]['hidden']}"
            ffns[words[at]], mixers[words[at]] = made, stack.mixer(word).to_dict()
            if word in blocks:
                blocks[words[at]] = blocks[word]
    first = ffns[words[0]]
    own = {word: ffn for word, ffn in ffns.items() if ffn != first}
    changes = {"ffn": first, "ffns": own, "mixers": mixers, "blocks": blocks}
    same = words == stack.words()
    return changes | ({} if same else {"pattern": " ".join(words), "depth": None})
