"""OLMo 3: OLMo 2 with a window in three of four layers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import FULL, SLIDING, WORDS
from mm.interchange.families.olmo2 import Olmo2
from mm.interchange.family import Settings
from mm.model.model import LmConfig
from mm.registry import FAMILIES


@FAMILIES.register("olmo3")
class Olmo3(Olmo2):
    """OLMo 3 (Team Olmo 2025), section 3.2."""

    kind: Literal["olmo3"] = "olmo3"  # type: ignore[assignment]
    architecture: ClassVar[str] = "Olmo3ForCausalLM"
    every: ClassVar[int] = 4  # layer that sees all, where the config does not say it

    def types(self, c: Settings) -> list[str]:
        n = c.whole("num_hidden_layers")
        usual = [FULL if (i + 1) % self.every == 0 else SLIDING for i in range(n)]
        return c.get("layer_types") or usual

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        return {"layer_types": types, "sliding_window": window or 4096}

    def model(self, c: Settings) -> dict[str, Any]:
        """A scaling that names no type of layer is of those that see all. Raises UserError."""
        values = super().model(c)
        mixers, word = values["backbone"]["mixers"], WORDS[SLIDING]
        if "rope_scaling" in c and word in mixers:
            mixers[word]["position"].pop("scaling", None)
        return values

    def config(self, lm: LmConfig) -> dict[str, Any]:
        values = super().config(lm)
        rope = values["rope_parameters"]
        if "rope_type" in rope:  # one for both
            rope = {FULL: rope, SLIDING: rope}
        for kind in (FULL, SLIDING):
            rope.setdefault(kind, {"rope_type": "default", "rope_theta": 500000.0})
        return {**values, "rope_parameters": rope}
