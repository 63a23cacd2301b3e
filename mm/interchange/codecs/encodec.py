"""EnCodec. N samples, F frames, Q books."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mm.interchange.codecs import seanet
from mm.interchange.codecs.family import (
    AudioFamily,
    Codebook,
    books_in_use,
    codebook_entry,
    whole_number,
)
from mm.interchange.family import Settings
from mm.interchange.parts import Entry, Part
from mm.registry import CODECS
from mm.tokenizers.audio.codec import AudioCodecConfig

USUAL = {
    "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0],
    "sampling_rate": 24000,
    "audio_channels": 1,
    "hidden_size": 128,
    "num_filters": 32,
    "num_residual_layers": 1,
    "upsampling_ratios": [8, 5, 4, 2],
    "norm_type": "weight_norm",
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "use_causal_conv": True,
    "pad_mode": "reflect",
    "compress": 2,
    "num_lstm_layers": 2,
    "trim_right_ratio": 1.0,
    "codebook_size": 1024,
    "use_conv_shortcut": True,
}


@CODECS.register("encodec")
class Encodec(AudioFamily):
    """Defossez et al. 2022 (arXiv:2210.13438): mono, whole signals (24 and 32 kHz)."""

    kind: Literal["encodec"] = "encodec"
    silent: ClassVar[str] = r"\.codebook\.(embed_avg|inited)$"

    def network(self, c: Settings, before: Settings, books: int | None) -> dict[str, Any]:
        c = c.with_usual(USUAL)
        for key, only in (("norm_type", "weight_norm"), ("normalize", False)):
            c.only(key, only)
        for key in ("chunk_length_s", "overlap"):
            if c.get(key) is not None:
                raise c.refuse(key, "has no equal here; only null has: signals are not cut")
        hidden, size = whole_number(c, "hidden_size"), whole_number(c, "codebook_size")
        if size < 2:
            raise c.refuse("codebook_size", "is no choice of codes")
        c.only("codebook_dim", hidden, hidden)
        front, rate = seanet.front_end(c), self.sampling_rate(c, before)
        rates = c["target_bandwidths"]
        if not isinstance(rates, list) or not rates or not all(_is_rate(r) for r in rates):
            raise c.refuse("target_bandwidths", "is no list of kilobits a second")
        frames = math.ceil(rate / math.prod(front["strides"]))
        all_books = int(1000 * rates[-1] // (frames * math.ceil(math.log2(size))))
        usual = max(1, math.floor(rates[0] * 1000 / (math.log2(size) * frames)))
        quantizer = {
            "kind": "rvq",
            "n_codebooks": books_in_use(c, all_books, usual, books),
            "codebook_size": size,
            "d": hidden,
            "normalize": "none",
            "kmeans_steps": 0,
            "zero_code": False,
        }
        layers = whole_number(c, "num_lstm_layers", most=16)
        return {
            "sample_rate": rate,
            "frontend": front | {"lstm_layers": layers},
            "quantizer": quantizer,
        }

    def canonical(self, name: str) -> str:
        """Weight normalisation has two spellings, by the version of torch."""
        return re.sub(
            r"\.weight_([gv])$",
            lambda m: f".parametrizations.weight.original{'gv'.index(m[1])}",
            name,
        )

    def entries(self, net: AudioCodecConfig) -> Iterator[Entry]:
        yield from seanet.entries(net.frontend, "frontend.", convolution_entries)  # type: ignore[arg-type]
        for q in range(net.quantizer.n_codebooks):
            theirs = f"quantizer.layers.{q}.codebook"
            names = (f"{theirs}.embed", f"{theirs}.cluster_size")
            yield codebook_entry(f"quantizer.books.{q}", names, Codebook())

    def is_spare(self, net: AudioCodecConfig, name: str) -> bool:
        book = re.match(r"quantizer\.layers\.(\d+)\.codebook\.", name)
        return book is not None and int(book[1]) >= net.quantizer.n_codebooks

    def their_codes(self, peer: Any, wave_N: Tensor, books: int) -> Tensor:
        peer.quantizer.layers = peer.quantizer.layers[:books]
        most = peer.config.target_bandwidths[-1]
        return peer.encode(wave_N[None, None], bandwidth=most).audio_codes[0, 0].T

    def their_wave(self, peer: Any, codes_FQ: Tensor) -> Tensor:
        return peer.decode(codes_FQ.T[None, None], [None]).audio_values[0, 0]


class WeightNorm(Part):
    """Length and direction of each row of a weight, multiplied out.

    Source: Salimans and Kingma 2016 (arXiv:1602.07868), eq. 2.
    """

    def join(self, given: Any) -> list[Tensor]:
        length, direction = (t.double() for t in given)
        norm = direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.dim() - 1))
        return [(length * direction / norm).to(torch.float32)]


def convolution_entries(ours: str, theirs: str) -> Iterator[Entry]:
    """Lines of a convolution with weight normalisation."""
    both = tuple(f"{theirs}.parametrizations.weight.original{i}" for i in (0, 1))
    yield Entry(f"{ours}.weight", both, WeightNorm())
    yield Entry(f"{ours}.bias", (f"{theirs}.bias",))


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < 1e6
