"""The audio codec network: front end, quantizer, front end back.

G items, N samples, F latent frames, Q books.

One network for all front ends; it is trained by the objective `codec` and served by
`AudioCodecTokenizer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as nnf
from pydantic import Field
from torch import Tensor

from mm.batch import Batch, Sum
from mm.config import Config
from mm.model.layer import ModelOut
from mm.registry import NETWORKS, QuantizerField
from mm.tokenizers.audio.dac import DacFrontEndConfig
from mm.tokenizers.audio.layers import Stream
from mm.tokenizers.audio.losses import valid_samples
from mm.tokenizers.audio.melcodec import MelFrontEndConfig
from mm.tokenizers.audio.seanet import SeanetFrontEndConfig
from mm.tokenizers.audio.seanet_transformer import SeanetTransformerConfig
from mm.tokenizers.network import TokenizerNetwork

LONG = 1024  # frames that are encoded at once

FrontEndConfig = Annotated[
    MelFrontEndConfig | SeanetFrontEndConfig | SeanetTransformerConfig | DacFrontEndConfig,
    Field(discriminator="kind"),
]


class AudioCodec(TokenizerNetwork):
    """Waveform to ids to waveform. Causal encoder.

    See the front end for what the decoder looks ahead.
    """

    kind = "audio_codec"

    def __init__(self, config: AudioCodecConfig):
        super().__init__()
        self.config = config
        self.quantizer = config.quantizer.build()
        self.frontend = config.frontend.build(self.quantizer.d, config.sample_rate)
        self.samples_per_frame: int = self.frontend.samples_per_frame

    def prepare(self, wave_GN: Tensor, length_G: Tensor) -> Tensor:
        """What the front end reads: silence behind an item's end, whole frames if it needs them."""
        wave = wave_GN * valid_samples(length_G, wave_GN.shape[1])
        extra = 0 if self.frontend.fills_end else -wave.shape[1] % self.samples_per_frame
        return nnf.pad(wave, (0, extra))

    def latents(self, wave_GN: Tensor, length_G: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (G, F, D) of zero-padded (G, N), and which are real (G, F) bool.

        F = ceil(N / samples_per_frame).
        """
        hop = self.samples_per_frame
        z = self.frontend.encode(self.prepare(wave_GN, length_G))
        return z, valid_samples((length_G + hop - 1) // hop, z.shape[1])

    def encode(self, wave_GN: Tensor, length_G: Tensor) -> Tensor:
        """Ids (G, F, Q) int64 of waveforms (G, N) with lengths (G,) in samples.

        Frames beyond an item's end are meaningless. Where the front end has ``whole_items``, what
        stands behind an item's end changes its last frames: lengths must be equal then. A causal
        front end reads more than `LONG` frames chunk by chunk: memory grows with a chunk alone.
        """
        wave, chunk = self.prepare(wave_GN, length_G), LONG * self.samples_per_frame
        if self.frontend.encode_lookahead != 0 or wave.shape[1] <= chunk:
            return self.quantizer(self.frontend.encode(wave)).ids
        stream: Stream = {}
        return torch.cat([self.encode_stream(part, stream) for part in wave.split(chunk, 1)], 1)

    def encode_stream(self, wave_GN: Tensor, stream: Stream) -> Tensor:
        """Ids (G, F, Q) of the next chunk; N a multiple of `samples_per_frame`.

        ``stream`` starts as an empty dict. Where the front end fills the end of a signal itself,
        the last chunk may have any length.
        """
        return self.quantizer(self.frontend.encode(wave_GN, stream)).ids

    def decode(self, ids_GFQ: Tensor, valid_GF: Tensor) -> Tensor:
        """Waveform (G, F * samples_per_frame) of the ids of the first books.

        Frames that are not valid are not heard.
        """
        z = self.quantizer.decode(ids_GFQ).to(next(self.frontend.parameters()).dtype)
        return self.frontend.decode(z * valid_GF[..., None], valid_GF)

    def forward(
        self,
        batch: Batch,
        *,
        scheduled: Mapping[str, float] = {},  # noqa: B006 - never written
        return_intermediates: frozenset[str] = frozenset(),
        seed: Tensor | int = 0,
        **_: Any,
    ) -> ModelOut:
        """Reconstruct ``batch.values[modality]``: data (G, N) in [-1, 1], length (G,) samples.

        Knobs: "bypass" 1 skips the quantizer and its loss (warm-up: latents are worth coding before
        they are coded); "books" in (0, 1] is the share of codebooks in use (quantizer dropout),
        default all.

        Returns:
            hidden: (G, F, D) latents. intermediates: "wave" (G, N) float32, zero beyond
            ``length``; "ids"
                (G, F, Q).
            aux: the quantizer's, with "commitment" weighed in samples, so that its count follows
                from the lengths.
        """
        values = batch.values[self.config.modality]
        n, bypass = values.data.shape[1], bool(scheduled.get("bypass", 0))
        n_books = math.ceil(scheduled.get("books", 1.0) * self.quantizer.n_codebooks)
        z, valid = self.latents(values.data, values.length)
        out = self.quantizer(z, valid=valid, n_books=n_books, bypass=bypass, seed=seed)
        aux = dict(out.aux)
        if "commitment" in aux:
            total, count = aux["commitment"]
            aux["commitment"] = Sum(
                total * (0.0 if bypass else float(self.samples_per_frame)),
                count * self.samples_per_frame,
            )
        wave = self.frontend.decode(out.z * valid[..., None], valid)[:, :n]
        wave = wave * valid_samples(values.length, n)
        return ModelOut(z, {}, None, {"wave": wave, "ids": out.ids}, aux)


@NETWORKS.register("audio_codec")
class AudioCodecConfig(Config):
    """Neural audio codec: one id of each book for every ``samples_per_frame`` samples."""

    kind: Literal["audio_codec"] = "audio_codec"
    modality: str = "audio"
    sample_rate: Annotated[int, Field(gt=0, description="Hz; other rates are resampled to it")] = (
        16000
    )
    frontend: FrontEndConfig = MelFrontEndConfig()
    quantizer: QuantizerField = Field(default="rvq", validate_default=True)

    @property
    def frames_per_second(self) -> float:
        return self.sample_rate / self.frontend.samples_per_frame

    def build(self, vocabulary: Any = None) -> AudioCodec:
        """Allocate the network; `mm.model.layer.init_weights` fills it."""
        return AudioCodec(self)

    @classmethod
    def smallest(cls) -> AudioCodecConfig:
        frontend = MelFrontEndConfig(
            n_mels=16, width=16, hidden=32, encoder_blocks=1, decoder_blocks=1, synthesis_blocks=1
        )
        return cls(frontend=frontend, quantizer={"kind": "rvq", "codebook_size": 8, "d": 4})  # type: ignore[arg-type]
