"""Adapters that become part of the matrices they adapt."""

from __future__ import annotations

from typing import ClassVar, Literal

from mm.errors import UserError
from mm.model.linears.lora import Lora
from mm.model.linears.nf4 import Nf4
from mm.registry import LINEARS, SURGERIES
from mm.surgery.base import Operated, Surgery, network_of
from mm.vocabulary import Vocabulary


@SURGERIES.register("merge_lora")
class MergeLora(Surgery):
    """A model of `linear: lora` or `nf4` as one of `linear: dense`."""

    kind: Literal["merge_lora"] = "merge_lora"

    keeps_function: ClassVar[bool] = True

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        module = network_of(before)
        found = {path: m for path, m in module.named_modules() if isinstance(m, Lora)}
        inside = tuple(f"{path}." for path in found)
        dense = {path: m.dense_weight() for path, m in found.items()}
        for path, m in module.named_modules():
            if isinstance(m, Nf4) and not path.startswith(inside):
                dense[path] = m.matrix()
        if not dense:
            raise UserError("surgery 'merge_lora': this model has neither adapters nor nf4")
        inside = tuple(f"{path}." for path in dense)
        tensors = {k: t for k, t in before.tensors.items() if not k.startswith(inside)}
        tensors |= {f"{path}.weight": weight for path, weight in dense.items()}
        for path, m in found.items():
            if (bias := getattr(m.base, "bias", None)) is not None:
                tensors[f"{path}.bias"] = bias.detach()
        below = getattr(before.config.linear, "base_layer", None)
        keeps = below is not None and below.kind == "dense"  # its biases
        linear = below if keeps else LINEARS.parse("dense")
        config = before.config.model_copy(update={"linear": linear})
        return Operated(config, tensors, before.vocabulary)
