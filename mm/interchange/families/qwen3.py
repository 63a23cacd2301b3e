"""Qwen3: queries and keys normed by head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import Decoder
from mm.interchange.families.qwen2 import Qwen2
from mm.interchange.family import Settings
from mm.registry import FAMILIES


@FAMILIES.register("qwen3")
class Qwen3(Qwen2):
    """Qwen team 2025 (arXiv:2505.09388)."""

    kind: Literal["qwen3"] = "qwen3"  # type: ignore[assignment]
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    qk_norm: ClassVar[Any] = True

    def bias(self, c: Settings) -> bool | list[str]:
        return Decoder.bias(self, c)
