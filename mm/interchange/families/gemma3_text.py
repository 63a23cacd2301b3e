"""Gemma 3's text model: queries and keys normed, rotations by the type of the layer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.gemma2 import Gemma2
from mm.model.model import LmConfig
from mm.registry import FAMILIES


@FAMILIES.register("gemma3_text")
class Gemma3Text(Gemma2):
    """Gemma 3 (arXiv:2503.19786), section 2."""

    kind: Literal["gemma3_text"] = "gemma3_text"  # type: ignore[assignment]
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    qk_norm: ClassVar[Any] = "zero_centred"
    every: ClassVar[int] = 6

    def config(self, lm: LmConfig) -> dict[str, Any]:
        values = super().config(lm)
        rope = values["rope_parameters"]
        if "rope_type" in rope:  # one for both
            rope = {"full_attention": rope, "sliding_attention": rope}
        for kind in ("full_attention", "sliding_attention"):
            rope.setdefault(kind, {"rope_type": "default", "rope_theta": 10000.0})
        return {**values, "rope_parameters": rope}
