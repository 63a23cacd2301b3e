"""OLMo: norms that learn nothing, and bounds of queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import Decoder
from mm.interchange.family import Settings
from mm.interchange.parts import Entry
from mm.model.mixers.attention.attention import AttentionConfig
from mm.model.model import LmConfig
from mm.registry import FAMILIES


@FAMILIES.register("olmo")
class Olmo(Decoder):
    """Groeneveld et al. 2024, OLMo (arXiv:2402.00838), section 2.1."""

    kind: Literal["olmo"] = "olmo"
    architecture: ClassVar[str] = "OlmoForCausalLM"
    norm: ClassVar[str] = "nonparametric"
    eps: ClassVar[float] = 1e-5  # of its code: no key of the config says another

    def more(self, c: Settings) -> dict[str, Any]:
        return {"clip": c.get("clip_qkv")}

    def more_config(self, attention: AttentionConfig) -> dict[str, Any]:
        return {"clip_qkv": attention.clip}

    def config(self, lm: LmConfig) -> dict[str, Any]:
        return {k: v for k, v in super().config(lm).items() if k != "rms_norm_eps"}

    def entries(self, lm: LmConfig) -> Iterator[Entry]:
        return (e for e in super().entries(lm) if not e.own[0].endswith("norm.weight"))
