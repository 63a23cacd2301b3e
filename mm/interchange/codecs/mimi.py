"""Mimi. N samples, F frames, Q books, W width."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mm.errors import UserError
from mm.interchange.codecs import seanet
from mm.interchange.codecs.family import (
    AudioFamily,
    Codebook,
    Pointwise,
    books_in_use,
    codebook_entry,
    whole_number,
)
from mm.interchange.encoders.family import activation_of, both
from mm.interchange.family import Settings, rope
from mm.interchange.parts import Entry, Part, Rows
from mm.registry import CODECS
from mm.tokenizers.audio.codec import AudioCodecConfig

USUAL = {
    "sampling_rate": 24000,
    "audio_channels": 1,
    "hidden_size": 512,
    "num_filters": 64,
    "num_residual_layers": 1,
    "upsampling_ratios": [8, 6, 5, 4],
    "kernel_size": 7,
    "last_kernel_size": 3,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "compress": 2,
    "trim_right_ratio": 1.0,
    "codebook_size": 2048,
    "codebook_dim": 256,
    "num_quantizers": 32,
    "use_conv_shortcut": False,
    "vector_quantization_hidden_dimension": 256,
    "num_semantic_quantizers": 1,
    "upsample_groups": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "sliding_window": 250,
}


@CODECS.register("mimi")
class Mimi(AudioFamily):
    """Defossez et al. 2024, "Moshi" (arXiv:2410.00037), section 3.3."""

    kind: Literal["mimi"] = "mimi"
    silent: ClassVar[str] = r"\.codebook\.initialized$"
    silent_keys: ClassVar[frozenset[str]] = frozenset(
        "_frame_rate layer_scale_initial_scale tie_word_embeddings use_streaming".split()
    )

    def network(self, c: Settings, before: Settings, books: int | None) -> dict[str, Any]:
        c = c.with_usual(USUAL)
        c.only("use_causal_conv", True)
        c.only("attention_bias", False)
        c.only("normalize", False)
        front, rate = seanet.front_end(c), self.sampling_rate(c, before)
        W, heads = whole_number(c, "hidden_size"), whole_number(c, "num_attention_heads")
        inner = math.ceil(rate / math.prod(front["strides"]))
        outer = c.get("_frame_rate") or c.get("frame_rate") or inner / 2
        known = isinstance(outer, int | float) and outer > 0 and math.isfinite(outer)
        stride = inner / outer if known else 0
        if not 2 <= stride <= 64 or stride != int(stride):
            raise c.refuse("frame_rate", f"makes no whole stride over {inner} frames a second")
        attention = {
            "kind": "attention",
            "heads": heads,
            "kv_heads": whole_number(c, "num_key_value_heads"),
            "head_dim": whole_number(c, "head_dim", max(1, W // heads)),
            "qk_norm": False,
            "position": rope(c),
            "window": whole_number(c, "sliding_window"),
        }
        activation = activation_of(c, "hidden_act", "gelu")
        layers = whole_number(c, "num_hidden_layers", most=256)
        backbone = {
            "kind": "stack",
            "pattern": " ".join(["attention"] * layers),
            "mixers": {"attention": attention},
            "ffn": {
                "kind": "mlp",
                "hidden": whole_number(c, "intermediate_size"),
                "activation": activation,
            },
            "block": {"kind": "prenorm", "eps": c["norm_eps"], "norm": "layer"},
        }
        code = whole_number(c, "vector_quantization_hidden_dimension")
        c.only("codebook_dim", code, code)
        first, all_books = (
            whole_number(c, "num_semantic_quantizers"),
            whole_number(c, "num_quantizers"),
        )
        used = books_in_use(c, all_books, all_books, books)
        if used <= first:
            raise UserError(f"--books {used}: {c.origin} has {first} books of speech; name more")
        return {
            "sample_rate": rate,
            "frontend": {
                "kind": "seanet_transformer",
                "seanet": front,
                "backbone": backbone,
                "stride": int(stride),
                "up_groups": whole_number(c, "upsample_groups"),
            },
            "quantizer": {
                "kind": "split_rvq",
                "n_codebooks": used,
                "n_first": first,
                "codebook_size": whole_number(c, "codebook_size"),
                "d": W,
                "d_code": code,
                "kmeans_steps": 0,
                "zero_code": False,
            },
        }

    def entries(self, net: AudioCodecConfig) -> Iterator[Entry]:
        front: Any = net.frontend
        quantizer: Any = net.quantizer
        yield from seanet.entries(front.seanet, "frontend.seanet.", both)
        for side, name in (("encoder", "down"), ("decoder", "up")):
            yield Entry(f"frontend.{name}.weight", (f"{name}sample.conv.weight",))
            for i in range(len(front.backbone.words())):
                ours = f"frontend.{side}_layers.backbone.layers.{i}"
                theirs = f"{side}_transformer.layers.{i}"
                yield from layer_entries(ours, theirs, front.backbone.mixer("attention"))
        counts = {"semantic": quantizer.n_first, "acoustic": quantizer.n_codebooks}
        counts["acoustic"] -= quantizer.n_first
        for ours, (kind, n) in zip(("first", "rest"), counts.items(), strict=True):
            theirs = f"quantizer.{kind}_residual_vector_quantizer"
            for matrix, name in (("inner", "input_proj"), ("out", "output_proj")):
                place = f"quantizer.{ours}.{matrix}.weight"
                if quantizer.d_code == quantizer.d:
                    yield Entry(place, (), Identity(quantizer.d))
                else:
                    yield Entry(place, (f"{theirs}.{name}.weight",), Pointwise())
            for q in range(n):
                book = f"{theirs}.layers.{q}.codebook"
                names = (f"{book}.embed_sum", f"{book}.cluster_usage")
                yield codebook_entry(
                    f"quantizer.{ours}.chain.books.{q}", names, Codebook(sums=True)
                )

    def is_spare(self, net: AudioCodecConfig, name: str) -> bool:
        quantizer: Any = net.quantizer
        book = re.match(r"quantizer\.acoustic_residual_vector_quantizer\.layers\.(\d+)\.", name)
        return book is not None and int(book[1]) >= quantizer.n_codebooks - quantizer.n_first

    def their_codes(self, peer: Any, wave_N: Tensor, books: int) -> Tensor:
        return peer.encode(wave_N[None, None], num_quantizers=books).audio_codes[0].T

    def their_wave(self, peer: Any, codes_FQ: Tensor) -> Tensor:
        return peer.decode(codes_FQ.T[None]).audio_values[0, 0]


def layer_entries(ours: str, theirs: str, attention: Any) -> Iterator[Entry]:
    """Lines of a layer of attention and a feed-forward, whose branches are scaled."""
    H, G, K = attention.heads, attention.kv_heads, attention.head_dim
    qkv = tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv")
    yield from both(f"{ours}.mixer_norm", f"{theirs}.input_layernorm")
    yield Entry(f"{ours}.mixer.qkv.weight", qkv, Rows(H * K, G * K, G * K))
    out = (f"{theirs}.self_attn.o_proj.weight", f"{theirs}.self_attn_layer_scale.scale")
    yield Entry(f"{ours}.mixer.out.weight", out, Scaled())
    yield from both(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm")
    yield Entry(f"{ours}.ffn.up.weight", (f"{theirs}.mlp.fc1.weight",))
    out = (f"{theirs}.mlp.fc2.weight", f"{theirs}.mlp_layer_scale.scale")
    yield Entry(f"{ours}.ffn.out.weight", out, Scaled())


class Scaled(Part):
    """A matrix whose rows are scaled by a vector; the two become one."""

    def join(self, given: Any) -> list[Tensor]:
        matrix, scale = given
        return [matrix * scale[:, None]]


class Identity(Part):
    """A matrix that changes nothing, where there is none."""

    def __init__(self, width: int):
        self.width = width

    def join(self, given: Any) -> list[Tensor]:
        return [torch.eye(self.width)]
