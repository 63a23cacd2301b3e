"""Qwen3-Next: gated delta rule, every fourth layer gated attention, experts in all layers.

H heads, G key heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import FULL, RECURRENT, Mixture
from mm.interchange.family import Settings, stack_of
from mm.interchange.parts import Entry, Pieces, Rows, Taps
from mm.model.mixers.attention.attention import AttentionConfig
from mm.model.mixers.linear_attention.delta_rule import DeltaRuleConfig
from mm.model.model import LmConfig
from mm.registry import FAMILIES


@FAMILIES.register("qwen3_next")
class Qwen3Next(Mixture):
    """Qwen team 2025, Qwen3-Next; every layer has experts."""

    kind: Literal["qwen3_next"] = "qwen3_next"
    partial: ClassVar[bool] = True
    architecture: ClassVar[str] = "Qwen3NextForCausalLM"
    mixers: ClassVar[tuple[str, ...]] = ("attention", "delta_rule")
    norm: ClassVar[str] = "zero_centred"
    qk_norm: ClassVar[Any] = "zero_centred"
    share: ClassVar[float] = 0.25
    # Its heads of later tokens are not read by `transformers` either.
    silent: ClassVar[str] = r"\.rotary_emb\.inv_freq$|^mtp\."

    def types(self, c: Settings) -> list[str]:
        c.only("decoder_sparse_step", 1)
        c.only("mlp_only_layers", [])
        c.get("intermediate_size")  # of the dense layers, of which there are none
        n, every = c.whole("num_hidden_layers"), c.get("full_attention_interval", 4)
        return c.get("layer_types") or [RECURRENT if (i + 1) % every else FULL for i in range(n)]

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        return {"layer_types": types}

    def more(self, c: Settings) -> dict[str, Any]:
        return {"gate": True}

    def ffn(self, c: Settings) -> dict[str, Any]:
        hidden = c.whole(self.hidden_key)
        shared = c.whole("shared_expert_intermediate_size", 512)
        if shared % hidden:
            raise c.refuse("shared_expert_intermediate_size", f"is no multiple of {hidden}")
        return super().ffn(c) | {"shared": shared // hidden, "shared_gate": True}

    def normalises(self, c: Settings) -> bool:
        return bool(c.get("norm_topk_prob", True))

    def ffn_config(self, ffn: Any) -> dict[str, Any]:
        return {
            **super().ffn_config(ffn),
            "norm_topk_prob": ffn.normalise,
            "shared_expert_intermediate_size": ffn.shared * ffn.hidden,
        }

    def ffn_entries(self, lm: LmConfig, ours: str, theirs: str) -> Iterator[Entry]:
        yield from super().ffn_entries(lm, ours, theirs)
        ffn: Any = stack_of(lm).ffn
        ours, theirs, F = f"{ours}.ffn", f"{theirs}.mlp", ffn.shared * ffn.hidden
        both = (f"{theirs}.shared_expert.gate_proj", f"{theirs}.shared_expert.up_proj")
        yield from self.matrix(lm, "gate_up", f"{ours}.shared.gate_up", both, Rows(F, F))
        down = (f"{theirs}.shared_expert.down_proj",)
        yield from self.matrix(lm, "out", f"{ours}.shared.out", down)
        yield Entry(f"{ours}.shared_gate.weight", (f"{theirs}.shared_expert_gate.weight",))

    def attention_entries(
        self, lm: LmConfig, mixer: AttentionConfig, ours: str, theirs: str
    ) -> Iterator[Entry]:
        H, G, K = mixer.sizes(lm.d_model)
        heads = range(H)
        part = Pieces(
            {"query": K, "gate": K, "key": G * K, "value": G * K},
            [[(n, h) for h in heads for n in ("query", "gate")], [("key", 0)], [("value", 0)]],
            [
                [*(("query", h) for h in heads), ("key", 0), ("value", 0)],
                [("gate", h) for h in heads],
            ],
        )
        yield Entry(
            (f"{ours}.mixer.qkv.weight", f"{ours}.mixer.gate.weight"),
            tuple(f"{theirs}.{name}_proj.weight" for name in "qkv"),
            part,
        )
        yield Entry(f"{ours}.mixer.out.weight", (f"{theirs}.o_proj.weight",))
        for name in ("q_norm", "k_norm"):
            yield Entry(f"{ours}.mixer.{name}.weight", (f"{theirs}.{name}.weight",))

    def recurrent(self, c: Settings) -> dict[str, Any]:
        return {
            "kind": "delta_rule",
            "heads": c.whole("linear_num_value_heads", 32),
            "key_heads": c.whole("linear_num_key_heads", 16),
            "key_dim": c.whole("linear_key_head_dim", 128),
            "value_dim": c.whole("linear_value_head_dim", 128),
            "conv_size": c.whole("linear_conv_kernel_dim", 4),
            "gate": "scalar",
            "output_gate": True,
            "norm_eps": c.get("rms_norm_eps", self.eps),
        }

    def recurrent_config(self, mixer: Any) -> dict[str, Any]:
        if not isinstance(mixer, DeltaRuleConfig):
            return super().recurrent_config(mixer)
        return {
            "linear_num_value_heads": mixer.heads,
            "linear_num_key_heads": mixer.key_heads or mixer.heads,
            "linear_key_head_dim": mixer.key_dim,
            "linear_value_head_dim": mixer.value_dim or mixer.key_dim,
            "linear_conv_kernel_dim": mixer.conv_size,
        }

    def recurrent_entries(
        self, lm: LmConfig, mixer: Any, ours: str, theirs: str
    ) -> Iterator[Entry]:
        ours, theirs = f"{ours}.mixer", f"{theirs}.linear_attn"
        H, G, K, V = mixer.heads, mixer.key_heads, mixer.key_dim, mixer.value_dim
        groups = range(G)
        of = lambda *names: [(n, g) for n in names for g in groups]
        each = lambda *names: [(n, g) for g in groups for n in names]
        values = H // G * V
        sizes = {"q": K, "k": K, "v": values, "z": values, "beta": H // G, "decay": H // G}
        qkv = Pieces(sizes, [each("q", "k", "v", "z")], [of("q", "k", "v"), of("z")])
        own = (f"{ours}.qkv.weight", f"{ours}.gate.weight")
        yield Entry(own, (f"{theirs}.in_proj_qkvz.weight",), qkv)
        rates = Pieces(sizes, [each("beta", "decay")], [of("beta", "decay")])
        yield Entry(f"{ours}.rates.weight", (f"{theirs}.in_proj_ba.weight",), rates)
        yield Entry(f"{ours}.conv.weight", (f"{theirs}.conv1d.weight",), Taps())
        yield Entry(f"{ours}.log_decay", (f"{theirs}.A_log",))
        yield Entry(f"{ours}.rate_bias", (f"{theirs}.dt_bias",))
        yield Entry(f"{ours}.norm.weight", (f"{theirs}.norm.weight",))
        yield Entry(f"{ours}.out.weight", (f"{theirs}.out_proj.weight",))
