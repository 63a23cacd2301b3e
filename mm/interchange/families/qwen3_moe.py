"""Qwen3 with experts."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import FULL, SLIDING, Mixture
from mm.interchange.family import Settings
from mm.registry import FAMILIES


@FAMILIES.register("qwen3_moe")
class Qwen3Moe(Mixture):
    """Qwen team 2025 (arXiv:2505.09388); every layer has experts."""

    kind: Literal["qwen3_moe"] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    qk_norm: ClassVar[Any] = True

    def types(self, c: Settings) -> list[str]:
        near = c.get("use_sliding_window", False) and c.get("sliding_window")
        c.only("decoder_sparse_step", 1)
        c.only("mlp_only_layers", [])
        c.get("intermediate_size")  # of the dense layers, of which there are none
        return [SLIDING if near else FULL] * c.whole("num_hidden_layers")

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        return {"use_sliding_window": window is not None, "sliding_window": window}

    def normalises(self, c: Settings) -> bool:
        return bool(c.get("norm_topk_prob", False))

    def ffn_config(self, ffn: Any) -> dict[str, Any]:
        return {**super().ffn_config(ffn), "norm_topk_prob": ffn.normalise}
