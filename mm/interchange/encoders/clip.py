"""CLIP's picture encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mm.interchange.encoders.family import Patch, Vision, both, join_rows, unread
from mm.interchange.family import Settings
from mm.interchange.parts import Entry, Part
from mm.model.adapters.encoder import EncoderAdapterConfig
from mm.registry import ENCODERS


@ENCODERS.register("clip_vision_model")
class ClipVision(Vision):
    """Radford et al. 2021 (arXiv:2103.00020): every patch as the last layer leaves it.

    The norm behind it is of what its pooling head reads, and is not here.
    """

    kind: Literal["clip_vision_model"] = "clip_vision_model"
    prefixes: ClassVar[tuple[str, ...]] = ("", "vision_model.")
    before: ClassVar[int] = 1
    processor: ClassVar[str] = "CLIPImageProcessor"
    usual: ClassVar[dict[str, Any]] = {
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
        "image_size": 224,
    }
    last_norm: ClassVar[str] = "none"

    def adapter(self, c: Settings) -> dict[str, Any]:
        eps = c.with_usual(self.usual)["layer_norm_eps"]
        return {**super().adapter(c), "input_norm": eps}

    def entries(self, config: EncoderAdapterConfig) -> Iterator[Entry]:
        W = config.width
        yield Entry("inner.weight", ("embeddings.patch_embedding.weight",), Patch())
        places = ("embeddings.position_embedding.weight",)
        yield Entry(("inner.bias", "position.table"), places, BiasInPlaces(W))
        yield Entry("class_token", ("embeddings.class_embedding",), Row())
        yield from both("norm", "pre_layrnorm")
        for i in range(len(config.backbone.words())):  # type: ignore[attr-defined]
            ours, theirs = f"backbone.layers.{i}", f"encoder.layers.{i}"
            qkv = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
            yield from both(f"{ours}.mixer_norm", f"{theirs}.layer_norm1")
            yield from join_rows(f"{ours}.mixer.qkv", qkv, W)
            yield from both(f"{ours}.mixer.out", f"{theirs}.self_attn.out_proj")
            yield from both(f"{ours}.ffn_norm", f"{theirs}.layer_norm2")
            yield from both(f"{ours}.ffn.up", f"{theirs}.mlp.fc1")
            yield from both(f"{ours}.ffn.out", f"{theirs}.mlp.fc2")
        yield from unread(W)


@ENCODERS.register("clip")
class Clip(ClipVision):
    """The same, of a folder that holds the text encoder too."""

    kind: Literal["clip"] = "clip"  # type: ignore[assignment]
    inside: ClassVar[str | None] = "vision_config"
    prefixes: ClassVar[tuple[str, ...]] = ("vision_model.",)


class Row(Part):
    """A vector there, a matrix of one row here."""

    def join(self, given: Any) -> list[Tensor]:
        return [given[0][None]]

    def split(self, ours: Any) -> list[Tensor]:
        return [ours[0][0]]


class BiasInPlaces(Part):
    """A bias of patches that they have not: zeros, and on the way back part of each place's row."""

    def __init__(self, width: int):
        self.width = width

    def join(self, given: Any) -> list[Tensor]:
        return [torch.zeros(self.width), given[0]]

    def split(self, ours: Any) -> list[Tensor]:
        bias, table = ours
        return [torch.cat([table[:1], table[1:] + bias])]
