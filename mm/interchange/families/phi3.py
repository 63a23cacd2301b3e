"""Phi-3: Llama whose matrices are stored joined, as they are here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import FULL, SLIDING, Decoder
from mm.interchange.family import Settings
from mm.interchange.parts import Entry
from mm.model.model import LmConfig
from mm.registry import FAMILIES


@FAMILIES.register("phi3")
class Phi3(Decoder):
    """Abdin et al. 2024 (arXiv:2404.14219), Phi-3 and Phi-4."""

    kind: Literal["phi3"] = "phi3"
    partial: ClassVar[bool] = True
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    eps: ClassVar[float] = 1e-5

    def types(self, c: Settings) -> list[str]:
        return [SLIDING if c.get("sliding_window") else FULL] * c.whole("num_hidden_layers")

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        return {"sliding_window": window}

    def more(self, c: Settings) -> dict[str, Any]:
        D, H = c.whole("hidden_size"), c.whole("num_attention_heads")
        c.only("head_dim", D // H)
        return {}

    def attention_entries(
        self, lm: LmConfig, mixer: Any, ours: str, theirs: str
    ) -> Iterator[Entry]:
        yield Entry(f"{ours}.mixer.qkv.weight", (f"{theirs}.qkv_proj.weight",))
        yield Entry(f"{ours}.mixer.out.weight", (f"{theirs}.o_proj.weight",))

    def ffn_entries(self, lm: LmConfig, ours: str, theirs: str) -> Iterator[Entry]:
        yield Entry(f"{ours}.ffn.gate_up.weight", (f"{theirs}.mlp.gate_up_proj.weight",))
        yield Entry(f"{ours}.ffn.out.weight", (f"{theirs}.mlp.down_proj.weight",))
