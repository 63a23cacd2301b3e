"""Janus' image tokenizer. G images, C colours, S side in pixels, L codes of an image."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from mm.interchange.codecs.family import (
    Codebook,
    CodecReport,
    TokenizerFamily,
    books_in_use,
    codebook_entry,
    whole_number,
)
from mm.interchange.encoders.family import both, join_rows
from mm.interchange.family import Settings
from mm.interchange.parts import Entry
from mm.registry import CODECS
from mm.tokenizers.image.vqgan import ImageVqganConfig

USUAL = {
    "embed_dim": 8,
    "num_embeddings": 16384,
    "latent_channels": 256,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "num_patches": 32,
}
GROUPS = 32  # of each norm


@CODECS.register("janus_vqgan")
class JanusVqgan(TokenizerFamily):
    """A VQGAN: Sun et al. 2024, "LlamaGen" (arXiv:2406.06525), as Janus (arXiv:2410.13848) has it.

    The nearest code is that of plain distances, and the decoder reads codes of unit length, as in
    the code of `transformers`.
    """

    kind: Literal["janus_vqgan"] = "janus_vqgan"
    network_kind: ClassVar[str] = "image_vqgan"
    auto: ClassVar[str] = "JanusVQVAE"
    silent_keys: ClassVar[frozenset[str]] = frozenset(
        "dropout hidden_act image_token_embed_dim num_hidden_layers projection_dim".split()
    )

    def network(self, c: Settings, before: Settings, books: int | None) -> dict[str, Any]:
        c = c.with_usual(USUAL)
        c.only("double_latent", False)
        c.only("in_channels", 3)
        c.only("out_channels", 3)
        books_in_use(c, 1, 1, books)
        factors, width = c["channel_multiplier"], whole_number(c, "base_channels")
        if (
            not isinstance(factors, list)
            or not 0 < len(factors) <= 12
            or any(type(n) is not int or not 0 < n <= 64 for n in factors)
        ):
            raise c.refuse("channel_multiplier", "is no list of factors")
        if width % GROUPS:
            raise c.refuse("base_channels", f"is no multiple of {GROUPS}, the groups of each norm")
        size = whole_number(c, "num_patches", most=1024) * 2 ** (len(factors) - 1)
        self.require_pixels(before, size)
        return {
            "size": size,
            "width": width,
            "widths": [width * n for n in factors],
            "blocks": whole_number(c, "num_res_blocks", most=64),
            "latent": whole_number(c, "latent_channels"),
            "groups": GROUPS,
            "unit_codes": True,
            "quantizer": {
                "kind": "vq",
                "codebook_size": whole_number(c, "num_embeddings"),
                "d": whole_number(c, "embed_dim"),
                "normalize": "none",
                "kmeans_steps": 0,
            },
        }

    def require_pixels(self, before: Settings, size: int) -> None:
        """Raise UserError where a preprocessor makes other pixels than ours, from -1 to 1."""
        for key in ("image_mean", "image_std"):
            if before.get(key, 0.5) not in ([0.5] * 3, 0.5):
                raise before.refuse(key, "has no equal here; only 0.5 (values from -1 to 1) has")
        scale = before.get("rescale_factor", 1 / 255)
        if not isinstance(scale, int | float) or abs(scale - 1 / 255) > 1e-9:
            raise before.refuse("rescale_factor", "has no equal here; only 1 / 255 has")
        sides = before.get("size", size)
        for side in sides.values() if isinstance(sides, dict) else (sides,):
            if side != size:
                raise before.refuse("size", f"is not that of config.json, {size}")

    def entries(self, net: ImageVqganConfig) -> Iterator[Entry]:
        top = len(net.widths) - 1
        yield from both("first", "encoder.conv_in")
        yield from both("to_code", "quant_conv")
        yield from both("from_code", "post_quant_conv")
        yield from both("widen", "decoder.conv_in")
        yield codebook_entry("quantizer.book", ("quantize.embedding.weight",), Codebook())
        for side in ("encoder", "decoder"):
            yield from both(f"{side}_end.0", f"{side}.norm_out")
            yield from both(f"{side}_end.2", f"{side}.conv_out")
            middle, theirs = f"{side}_middle", f"{side}.mid"
            yield from residual(f"{middle}.0", f"{theirs}.block_1", False)
            yield from attention(f"{middle}.1", f"{theirs}.attn_1", net.widths[-1])
            yield from residual(f"{middle}.2", f"{theirs}.block_2", False)
        before, behind = (net.width, *net.widths), (net.widths[-1], *reversed(net.widths))
        for i in range(top + 1):
            changes = before[i] != before[i + 1]
            yield from level(f"down.{i}", f"encoder.down.{i}", net, net.blocks, changes, i == top)
            if i < top:
                at = net.blocks
                yield from both(f"down.{i}.{at}.conv", f"encoder.down.{i}.downsample.conv")
            changes = behind[i] != behind[i + 1]
            yield from level(f"up.{i}", f"decoder.up.{i}", net, net.blocks + 1, changes, i == 0)
            if i < top:
                at = (net.blocks + 1) * (2 if i == 0 else 1)
                yield from both(f"up.{i}.{at}.conv", f"decoder.up.{i}.upsample.conv")

    @torch.no_grad()
    def compare(self, tokenizer: Any, peer: Any) -> CodecReport:
        """Codes in float64, pixels from 0 to 1 in float32."""
        peer, net = getattr(peer, "vqmodel", peer), tokenizer.net
        size, rng = net.config.size, torch.Generator().manual_seed(17)
        coarse = torch.rand(2, 3, 8, 8, generator=rng)
        images = F.interpolate(coarse, size=(size, size), mode="bilinear").double()
        wide = copy.deepcopy(net).double()
        own = wide.quantizer(wide.encode(images)).ids.flatten(1)
        theirs = copy.deepcopy(peer).double().encode(2 * images - 1).image_tokens.view(2, -1)
        h, w = net.config.grid
        mine = net.decode(net.quantizer.decode(theirs.view(2, h, w, 1)))
        wanted = (peer.decode(theirs) + 1) / 2
        different = int((own != theirs).sum())
        apart = float((mine - wanted).abs().max())
        return CodecReport(own.numel(), different, apart, float(wanted.std()))


@CODECS.register("janus")
class Janus(JanusVqgan):
    """The same, of a folder that holds the whole model."""

    kind: Literal["janus"] = "janus"  # type: ignore[assignment]
    inside: ClassVar[str | None] = "vq_config"
    prefixes: ClassVar[tuple[str, ...]] = ("model.vqmodel.", "vqmodel.")
    auto: ClassVar[str] = "AutoModel"


def level(
    ours: str, theirs: str, net: ImageVqganConfig, blocks: int, changes: bool, attends: bool
) -> Iterator[Entry]:
    """Lines of the blocks of a level, the first of which may change the width."""
    for j in range(blocks):
        at = 2 * j if attends else j
        yield from residual(f"{ours}.{at}", f"{theirs}.block.{j}", changes and j == 0)
        if attends:
            yield from attention(f"{ours}.{at + 1}", f"{theirs}.attn.{j}", net.widths[-1])


def residual(ours: str, theirs: str, changes: bool) -> Iterator[Entry]:
    """Lines of a residual block."""
    yield from both(f"{ours}.first_norm", f"{theirs}.norm1")
    yield from both(f"{ours}.first", f"{theirs}.conv1")
    yield from both(f"{ours}.second_norm", f"{theirs}.norm2")
    yield from both(f"{ours}.second", f"{theirs}.conv2")
    if changes:
        yield from both(f"{ours}.shortcut", f"{theirs}.nin_shortcut")


def attention(ours: str, theirs: str, width: int) -> Iterator[Entry]:
    """Lines of attention over a grid."""
    yield from both(f"{ours}.norm", f"{theirs}.norm")
    yield from join_rows(f"{ours}.qkv", tuple(f"{theirs}.{name}" for name in "qkv"), width)
    yield from both(f"{ours}.out", f"{theirs}.proj_out")
