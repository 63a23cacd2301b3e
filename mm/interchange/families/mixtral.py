"""Mixtral: Mistral with experts."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import FULL, SLIDING, Mixture
from mm.interchange.family import Settings
from mm.registry import FAMILIES


@FAMILIES.register("mixtral")
class Mixtral(Mixture):
    """Jiang et al. 2024 (arXiv:2401.04088)."""

    kind: Literal["mixtral"] = "mixtral"
    architecture: ClassVar[str] = "MixtralForCausalLM"
    eps: ClassVar[float] = 1e-5
    place: ClassVar[str] = "block_sparse_moe"
    experts_key: ClassVar[str] = "num_local_experts"
    hidden_key: ClassVar[str] = "intermediate_size"
    matrices: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")

    def types(self, c: Settings) -> list[str]:
        return [SLIDING if c.get("sliding_window") else FULL] * c.whole("num_hidden_layers")

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        return {"sliding_window": window}
