"""Adapters that become part of the matrices they adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor

from mm.errors import UserError
from mm.model.linears.lora import Lora
from mm.model.linears.nf4 import Nf4
from mm.registry import LINEARS, SURGERIES
from mm.surgery.base import Operated, Source, Surgery, assemble, empty_network, filled_module
from mm.vocabulary import Vocabulary


@SURGERIES.register("merge_lora")
class MergeLora(Surgery):
    """A model of `linear: lora` or `nf4` as one of `linear: dense`."""

    kind: Literal["merge_lora"] = "merge_lora"

    keeps_function: ClassVar[bool] = True

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        module = empty_network(before.config, before.vocabulary)
        found = {path: m for path, m in module.named_modules() if isinstance(m, Lora)}
        inside = tuple(f"{path}." for path in found)
        given = before.tensors
        dense: dict[str, Callable[[], Tensor]] = {}
        for path, m in module.named_modules():
            if path in found:
                m.require_one_matrix()
                dense[path] = lambda p=path: filled_module(module, p, given).dense_weight()
            elif isinstance(m, Nf4) and not path.startswith(inside):
                dense[path] = lambda p=path: filled_module(module, p, given).matrix()
        if not dense:
            raise UserError("surgery 'merge_lora': this model has neither adapters nor nf4")
        inside = tuple(f"{path}." for path in dense)
        table: dict[str, Source] = {k: k for k in given if not k.startswith(inside)}
        table |= {f"{path}.weight": make for path, make in dense.items()}
        for path, m in found.items():
            if getattr(m.base, "bias", None) is not None:
                table[f"{path}.bias"] = f"{path}.base.bias"
        below = getattr(before.config.linear, "base_layer", None)
        keeps = below is not None and below.kind == "dense"  # its biases
        linear = below if keeps else LINEARS.parse("dense")
        config = before.config.model_copy(update={"linear": linear})
        return assemble(before, config, table)
