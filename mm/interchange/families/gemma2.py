"""Gemma 2: norms on both sides, soft-caps, a window on every other layer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import FULL, SLIDING, Decoder
from mm.interchange.family import Settings
from mm.model.mixers.attention.attention import AttentionConfig
from mm.model.model import LmConfig
from mm.registry import FAMILIES


@FAMILIES.register("gemma2")
class Gemma2(Decoder):
    """Gemma 2 (arXiv:2408.00118), section 2."""

    kind: Literal["gemma2"] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    norm: ClassVar[str] = "zero_centred"
    tied: ClassVar[bool] = True
    scaled: ClassVar[bool] = True
    activation_key: ClassVar[str] = "hidden_activation"
    activation: ClassVar[str] = "gelu_pytorch_tanh"
    every: ClassVar[int] = 2  # layer that sees all, where the config does not say it
    norms: ClassVar[tuple[str | None, ...]] = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )

    def types(self, c: Settings) -> list[str]:
        c.only("use_bidirectional_attention", False, False)
        c.get("hidden_act")  # `hidden_activation` is what is read there
        given, n = c.get("layer_types"), c.whole("num_hidden_layers")
        every = c.get("sliding_window_pattern", self.every)
        return given or [FULL if (i + 1) % every == 0 else SLIDING for i in range(n)]

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        return {"layer_types": types, "sliding_window": window or 4096}

    def more(self, c: Settings) -> dict[str, Any]:
        scalar = c.get("query_pre_attn_scalar", 256)
        return {"softcap": c.get("attn_logit_softcapping"), "query_scale": scalar**-0.5}

    def more_config(self, attention: AttentionConfig) -> dict[str, Any]:
        scale = attention.query_scale
        scalar = (attention.head_dim or 1) if scale is None else scale**-2
        whole = round(scalar)
        if whole and whole**-0.5 == scale:
            scalar = whole
        return {"attn_logit_softcapping": attention.softcap, "query_pre_attn_scalar": scalar}

    def softcap(self, c: Settings) -> float | None:
        return c.get("final_logit_softcapping")

    def config(self, lm: LmConfig) -> dict[str, Any]:
        head: Any = lm.heads["tokens"]
        return {**super().config(lm), "final_logit_softcapping": head.softcap}
