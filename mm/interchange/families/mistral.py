"""Mistral: Llama whose every layer may have a window."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import FULL, SLIDING, Decoder
from mm.interchange.family import Settings
from mm.registry import FAMILIES


@FAMILIES.register("mistral")
class Mistral(Decoder):
    """Jiang et al. 2023 (arXiv:2310.06825)."""

    kind: Literal["mistral"] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"

    def types(self, c: Settings) -> list[str]:
        return [SLIDING if c.get("sliding_window") else FULL] * c.whole("num_hidden_layers")

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        return {"sliding_window": window}
