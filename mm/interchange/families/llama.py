"""Llama, and what is written as one."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import Decoder
from mm.interchange.family import Settings
from mm.registry import FAMILIES


@FAMILIES.register("llama")
class Llama(Decoder):
    """Touvron et al. 2023 (arXiv:2302.13971), Llama 2 and 3."""

    kind: Literal["llama"] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    def bias(self, c: Settings) -> bool:
        attention, mlp = c.get("attention_bias", False), c.get("mlp_bias", False)
        if attention != mlp:
            raise c.refuse("attention_bias", f"with mlp_bias = {mlp}: biases of both or of none")
        return attention

    def bias_config(self, bias: bool | list[str]) -> dict[str, Any]:
        return {"attention_bias": bias is True, "mlp_bias": bias is True}
