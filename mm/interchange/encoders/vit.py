"""ViT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from mm.interchange.encoders.family import Patch, Vision, both, join_rows
from mm.interchange.family import Settings
from mm.interchange.parts import Entry, First
from mm.model.adapters.encoder import EncoderAdapterConfig
from mm.registry import ENCODERS


@ENCODERS.register("vit")
class Vit(Vision):
    """Dosovitskiy et al. 2020 (arXiv:2010.11929); patches are kept, its class token takes part."""

    kind: Literal["vit"] = "vit"
    prefixes: ClassVar[tuple[str, ...]] = ("", "vit.")
    before: ClassVar[int] = 1
    processor: ClassVar[str] = "ViTImageProcessor"
    usual: ClassVar[dict[str, Any]] = {
        "layer_norm_eps": 1e-12,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
        "image_size": 224,
    }

    def adapter(self, c: Settings) -> dict[str, Any]:
        c.only("qkv_bias", True)
        return super().adapter(c)

    def entries(self, config: EncoderAdapterConfig) -> Iterator[Entry]:
        projection = "embeddings.patch_embeddings.projection"
        yield Entry("inner.weight", (f"{projection}.weight",), Patch())
        yield Entry("inner.bias", (f"{projection}.bias",))
        yield Entry("class_token", ("embeddings.cls_token",), First())
        yield Entry("position.table", ("embeddings.position_embeddings",), First())
        for i in range(len(config.backbone.words())):
            ours, theirs = f"backbone.layers.{i}", f"encoder.layer.{i}"
            names = ("query", "key", "value")
            qkv = tuple(f"{theirs}.attention.attention.{name}" for name in names)
            yield from both(f"{ours}.mixer_norm", f"{theirs}.layernorm_before")
            yield from join_rows(f"{ours}.mixer.qkv", qkv, config.width)
            yield from both(f"{ours}.mixer.out", f"{theirs}.attention.output.dense")
            yield from both(f"{ours}.ffn_norm", f"{theirs}.layernorm_after")
            yield from both(f"{ours}.ffn.up", f"{theirs}.intermediate.dense")
            yield from both(f"{ours}.ffn.out", f"{theirs}.output.dense")
        yield from both("backbone.norm", "layernorm")
