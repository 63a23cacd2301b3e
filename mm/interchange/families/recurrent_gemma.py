"""RecurrentGemma: Griffin's recurrent blocks, every third layer attends to a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch

from mm.interchange.families.decoder import RECURRENT, SLIDING, Decoder
from mm.interchange.family import Settings
from mm.interchange.parts import Entry, Rows, Taps
from mm.model.mixers.ssm.rg_lru import RGLRUConfig
from mm.model.model import LmConfig
from mm.registry import FAMILIES

NAMES = {"recurrent": RECURRENT, "attention": SLIDING}
BIASES = ["gate_up", "inner", "out"]


@FAMILIES.register("recurrent_gemma")
class RecurrentGemma(Decoder):
    """Botev et al. 2024 (arXiv:2404.07839)."""

    kind: Literal["recurrent_gemma"] = "recurrent_gemma"
    partial: ClassVar[bool] = True
    architecture: ClassVar[str] = "RecurrentGemmaForCausalLM"
    mixers: ClassVar[tuple[str, ...]] = ("attention", "rg_lru")
    norm: ClassVar[str] = "zero_centred"
    tied: ClassVar[bool] = True
    share: ClassVar[float] = 0.5
    attention: ClassVar[str] = "temporal_block"
    mlp: ClassVar[str] = "mlp_block"
    last: ClassVar[str] = "final_norm"
    activation_key: ClassVar[str] = "hidden_activation"
    activation: ClassVar[str] = "gelu_pytorch_tanh"
    norms: ClassVar[tuple[str | None, ...]] = ("temporal_pre_norm", None, "channel_pre_norm", None)

    def types(self, c: Settings) -> list[str]:
        for of_first_weights in ("w_init_variance_scale", "final_w_init_variance_scale"):
            c.get(of_first_weights)
        given = c.get("block_types", ["recurrent", "recurrent", "attention"])
        n = c.whole("num_hidden_layers")
        if not isinstance(given, list) or {*given} - {*NAMES}:
            raise c.refuse("block_types", f"may hold {' and '.join(NAMES)} alone")
        return [NAMES[name] for name in (given * n)[:n]]

    def window(self, c: Settings) -> int:
        return c.whole("attention_window_size", 2048)

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        known = {kind: name for name, kind in NAMES.items()}
        return {
            "block_types": [known[kind] for kind in types],
            "attention_window_size": window,
        }

    def scale(self, D: int) -> float:
        return float(torch.tensor(D**0.5, dtype=torch.bfloat16))

    def softcap(self, c: Settings) -> float:
        return c.get("logits_soft_cap", 30.0)

    def bias(self, c: Settings) -> list[str]:
        return [*BIASES, "qkv"] if c.get("attention_bias", False) else BIASES

    def bias_config(self, bias: bool | list[str]) -> dict[str, Any]:
        return {"attention_bias": isinstance(bias, list) and "qkv" in bias}

    def ffn(self, c: Settings) -> dict[str, Any]:
        return super().ffn(c) | {"hidden": c.whole("intermediate_size") // 2}

    def ffn_config(self, ffn: Any) -> dict[str, Any]:
        return super().ffn_config(ffn) | {"intermediate_size": 2 * ffn.hidden}

    def recurrent(self, c: Settings) -> dict[str, Any]:
        return {
            "kind": "rg_lru",
            "width": c.whole("lru_width", c.whole("hidden_size")),
            "heads": c.whole("num_attention_heads"),
            "conv_size": c.whole("conv1d_width", 4),
            "first_unscaled": True,
        }

    def recurrent_config(self, mixer: Any) -> dict[str, Any]:
        if not isinstance(mixer, RGLRUConfig):
            return super().recurrent_config(mixer)
        return {"lru_width": mixer.width, "conv1d_width": mixer.conv_size}

    def config(self, lm: LmConfig) -> dict[str, Any]:
        head: Any = lm.heads["tokens"]
        made = super().config(lm)
        if made.setdefault("lru_width", None) is None:
            made["lru_width"] = lm.d_model
        return {**made, "logits_soft_cap": head.softcap}

    def recurrent_entries(
        self, lm: LmConfig, mixer: Any, ours: str, theirs: str
    ) -> Iterator[Entry]:
        ours, theirs = f"{ours}.mixer", f"{theirs}.temporal_block"
        W, gates = mixer.width, f"{theirs}.rg_lru"
        both = (f"{theirs}.linear_y", f"{theirs}.linear_x")
        yield from self.matrix(lm, "inner", f"{ours}.inner", both, Rows(W, W))
        yield from self.matrix(lm, "out", f"{ours}.out", (f"{theirs}.linear_out",))
        yield Entry(f"{ours}.conv.weight", (f"{theirs}.conv_1d.weight",), Taps())
        yield Entry(f"{ours}.conv.bias", (f"{theirs}.conv_1d.bias",))
        yield Entry(f"{ours}.decay", (f"{gates}.recurrent_param",))
        K = W // mixer.heads
        for kind in ("weight", "bias"):
            two = (f"{gates}.recurrent_gate_{kind}", f"{gates}.input_gate_{kind}")
            yield Entry(f"{ours}.gate_{kind}", two, Rows(K, K, dim=-1))
