"""The Descript Audio Codec. N samples, F frames, Q books."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from mm.interchange.codecs.family import (
    AudioFamily,
    Codebook,
    Pointwise,
    books_in_use,
    codebook_entry,
    strides_of,
    whole_number,
)
from mm.interchange.encoders.family import both
from mm.interchange.family import Settings
from mm.interchange.parts import Entry
from mm.registry import CODECS
from mm.tokenizers.audio.codec import AudioCodecConfig
from mm.tokenizers.audio.dac import DILATIONS

USUAL = {
    "encoder_hidden_size": 64,
    "downsampling_ratios": [2, 4, 8, 8],
    "decoder_hidden_size": 1536,
    "n_codebooks": 9,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "sampling_rate": 16000,
}


@CODECS.register("dac")
class Dac(AudioFamily):
    """Kumar et al. 2023 (arXiv:2306.06546). Signals are filled to whole frames, as before it."""

    kind: Literal["dac"] = "dac"
    silent_keys: ClassVar[frozenset[str]] = frozenset(
        "quantizer_dropout commitment_loss_weight codebook_loss_weight upsampling_ratios".split()
    )

    def network(self, c: Settings, before: Settings, books: int | None) -> dict[str, Any]:
        c = c.with_usual(USUAL)
        rate, strides = self.sampling_rate(c, before), strides_of(c, "downsampling_ratios")
        hop, width = math.prod(strides), whole_number(c, "encoder_hidden_size")
        wide, narrow = whole_number(c, "decoder_hidden_size"), 2 ** len(strides)
        if wide % narrow:
            raise c.refuse("decoder_hidden_size", f"does not halve {len(strides)} times")
        c.only("hidden_size", width * narrow, width * narrow)
        for where in (c, before):
            where.only("hop_length", hop, hop)
        all_books = whole_number(c, "n_codebooks")
        return {
            "sample_rate": rate,
            "frontend": {"kind": "dac", "strides": strides, "width": width, "decoder_width": wide},
            "quantizer": {
                "kind": "factorized_rvq",
                "n_codebooks": books_in_use(c, all_books, all_books, books),
                "codebook_size": whole_number(c, "codebook_size"),
                "d": width * narrow,
                "d_code": whole_number(c, "codebook_dim"),
                "kmeans_steps": 0,
            },
        }

    def entries(self, net: AudioCodecConfig) -> Iterator[Entry]:
        front: Any = net.frontend
        yield from both("frontend.first", "encoder.conv1")
        yield from both("frontend.to_code", "encoder.conv2")
        yield snake("frontend.encoder_snake", "encoder.snake1")
        yield from both("frontend.from_code", "decoder.conv1")
        yield from both("frontend.last", "decoder.conv2")
        yield snake("frontend.decoder_snake", "decoder.snake1")
        for i in range(len(front.strides)):
            for side, ours, theirs in (
                ("encoder", "downs", "conv1"),
                ("decoder", "ups", "conv_t1"),
            ):
                block = f"{side}.block.{i}"
                yield from both(f"frontend.{ours}.{i}", f"{block}.{theirs}")
                yield snake(f"frontend.{side}_snakes.{i}", f"{block}.snake1")
                for j in range(len(DILATIONS)):
                    own, unit = f"frontend.{side}_units.{i}.{j}", f"{block}.res_unit{j + 1}"
                    yield snake(f"{own}.before", f"{unit}.snake1")
                    yield from both(f"{own}.dilated", f"{unit}.conv1")
                    yield snake(f"{own}.between", f"{unit}.snake2")
                    yield from both(f"{own}.mix", f"{unit}.conv2")
        for q in range(net.quantizer.n_codebooks):
            own, book = f"quantizer.books.{q}", f"quantizer.quantizers.{q}"
            for ours, theirs in (("inner", "in_proj"), ("out", "out_proj")):
                yield Entry(f"{own}.{ours}.weight", (f"{book}.{theirs}.weight",), Pointwise())
                yield Entry(f"{own}.{ours}.bias", (f"{book}.{theirs}.bias",))
            yield codebook_entry(f"{own}.codes", (f"{book}.codebook.weight",), Codebook())

    def is_spare(self, net: AudioCodecConfig, name: str) -> bool:
        book = re.match(r"quantizer\.quantizers\.(\d+)\.", name)
        return book is not None and int(book[1]) >= net.quantizer.n_codebooks

    def their_codes(self, peer: Any, wave_N: Tensor, books: int) -> Tensor:
        filled = F.pad(wave_N, (0, -len(wave_N) % peer.config.hop_length))
        return peer.encode(filled[None, None], n_quantizers=books).audio_codes[0].T

    def their_wave(self, peer: Any, codes_FQ: Tensor) -> Tensor:
        return peer.decode(audio_codes=codes_FQ.T[None]).audio_values[0]


def snake(ours: str, theirs: str) -> Entry:
    """The line of an activation."""
    return Entry(f"{ours}.alpha", (f"{theirs}.alpha",))
