"""SigLIP's picture encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from mm.interchange.encoders.family import Patch, Vision, both, join_rows, unread
from mm.interchange.parts import Entry
from mm.model.adapters.encoder import EncoderAdapterConfig
from mm.registry import ENCODERS


@ENCODERS.register("siglip_vision_model")
class SiglipVision(Vision):
    """Zhai et al. 2023 (arXiv:2303.15343), without its pooling head: every patch is kept."""

    kind: Literal["siglip_vision_model"] = "siglip_vision_model"
    prefixes: ClassVar[tuple[str, ...]] = ("", "vision_model.")

    processor: ClassVar[str] = "SiglipImageProcessor"
    usual: ClassVar[dict[str, Any]] = {
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
        "image_size": 224,
    }
    written: ClassVar[dict[str, Any]] = {"vision_use_head": False}

    def entries(self, config: EncoderAdapterConfig) -> Iterator[Entry]:
        yield Entry("inner.weight", ("embeddings.patch_embedding.weight",), Patch())
        yield Entry("inner.bias", ("embeddings.patch_embedding.bias",))
        yield Entry("position.table", ("embeddings.position_embedding.weight",))
        for i in range(len(config.backbone.words())):
            ours, theirs = f"backbone.layers.{i}", f"encoder.layers.{i}"
            qkv = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
            yield from both(f"{ours}.mixer_norm", f"{theirs}.layer_norm1")
            yield from join_rows(f"{ours}.mixer.qkv", qkv, config.width)
            yield from both(f"{ours}.mixer.out", f"{theirs}.self_attn.out_proj")
            yield from both(f"{ours}.ffn_norm", f"{theirs}.layer_norm2")
            yield from both(f"{ours}.ffn.up", f"{theirs}.mlp.fc1")
            yield from both(f"{ours}.ffn.out", f"{theirs}.mlp.fc2")
        last = config.backbone.norm == "layer"  # type: ignore[attr-defined]
        yield from both("backbone.norm", "post_layernorm") if last else unread(config.width)


@ENCODERS.register("siglip")
class Siglip(SiglipVision):
    """The same, of a folder that holds the text encoder too."""

    kind: Literal["siglip"] = "siglip"  # type: ignore[assignment]
    inside: ClassVar[str | None] = "vision_config"
    prefixes: ClassVar[tuple[str, ...]] = ("vision_model.",)
