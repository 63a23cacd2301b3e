"""Qwen2: biases of queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import FULL, SLIDING, Decoder
from mm.interchange.family import Settings
from mm.registry import FAMILIES


@FAMILIES.register("qwen2")
class Qwen2(Decoder):
    """Yang et al. 2024 (arXiv:2407.10671), Qwen2.5 too."""

    kind: Literal["qwen2"] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"

    def types(self, c: Settings) -> list[str]:
        given, n = c.get("layer_types"), c.whole("num_hidden_layers")
        first, window = c.get("max_window_layers", 28), c.get("sliding_window")
        near = c.get("use_sliding_window", False) and window
        if given is not None:
            return list(given)
        return [SLIDING if near and i >= first else FULL for i in range(n)]

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        used = {"use_sliding_window": window is not None, "sliding_window": window}
        return {"layer_types": types, **used}

    def bias(self, c: Settings) -> bool | list[str]:
        return ["qkv"]
