"""Log-mel front end: causal log-mel encoder, causal ConvNeXt decoder, inverse-STFT head.

G items, N samples, F frames.

Learns intelligible speech in seconds of CPU time, where a waveform encoder takes minutes: the
spectrum is given, not learned.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as nnf
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import Config
from mm.tokenizers.audio.layers import CausalConv1d, ConvNeXt, Dense, LayerNorm, Stream
from mm.tokenizers.audio.mel import hann_window, log_mel


class MelFrontEndConfig(Config):
    """Log-mel in, inverse STFT out.

    One latent frame stands for ``hop * downsample`` samples (25 Hz at the defaults).
    """

    kind: Literal["mel"] = "mel"
    n_mels: Annotated[int, Field(gt=0)] = 64
    n_fft: Annotated[int, Field(gt=0, description="window of analysis and synthesis, samples")] = (
        640
    )
    hop: Annotated[int, Field(gt=0, description="samples between spectra")] = 160
    downsample: Annotated[int, Field(gt=0, description="spectra in one latent frame")] = 4
    width: Annotated[int, Field(gt=0)] = 128
    hidden: Annotated[int, Field(gt=0, description="hidden width of a ConvNeXt block")] = 384
    encoder_blocks: Annotated[int, Field(ge=0, description="at the latent rate")] = 1
    decoder_blocks: Annotated[int, Field(ge=0, description="at the latent rate")] = 1
    synthesis_blocks: Annotated[int, Field(ge=0, description="at the spectral rate")] = 3

    @model_validator(mode="after")
    def _whole_hops(self) -> MelFrontEndConfig:
        if self.n_fft % (2 * self.hop):
            raise ValueError(f"n_fft {self.n_fft} must be a multiple of 2 * hop = {2 * self.hop}")
        return self

    @property
    def samples_per_frame(self) -> int:
        return self.hop * self.downsample

    def build(self, d_code: int, sample_rate: int) -> MelFrontEnd:
        return MelFrontEnd(self, d_code, sample_rate)


class IstftHead(nn.Module):
    """Magnitude and phase of each spectrum, then windowed overlap-add.

    Source: Siuzdak, "Vocos" (2306.00814) section 3.3, with "same" padding: spectrum i writes
    samples from ``i * hop - (n_fft - hop) / 2`` on, so a sample needs spectra up to ``(n_fft - hop)
    / 2`` samples ahead of it.
    """

    def __init__(self, d: int, n_fft: int, hop: int):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.project = Dense(d, n_fft + 2)

    def init_weights(self) -> None:
        with torch.no_grad():  # start quiet: speech is mostly near silence
            self.project.bias[: self.n_fft // 2 + 1] = -1.0

    def forward(self, h_GFD: Tensor, valid_GF: Tensor) -> Tensor:
        """(G, F, D) -> (G, F * hop).

        Spectra that are not ``valid`` add nothing, so padding cannot be heard.
        """
        h = self.project(h_GFD)
        log_magnitude, phase = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=-1)
        magnitude = log_magnitude.clamp(max=5.0).exp()  # a runaway exponent would end the run
        window = hann_window(self.n_fft, magnitude.dtype, magnitude.device)
        with torch.autocast(magnitude.device.type, enabled=False):
            pieces = torch.fft.irfft(
                torch.complex(magnitude * phase.cos(), magnitude * phase.sin()), n=self.n_fft
            )
        valid = valid_GF[..., None].to(pieces.dtype)
        wave = self._overlap_add(pieces * window * valid)
        envelope = self._overlap_add((window.square() * valid).expand_as(pieces))
        return wave / envelope.clamp_min(1e-3)

    def _overlap_add(self, pieces_GFn: Tensor) -> Tensor:
        """(G, F, n_fft) pieces, ``hop`` apart, to (G, F * hop) samples."""
        G, F, n = pieces_GFn.shape
        parts = n // self.hop
        rows = pieces_GFn.view(G, F, parts, self.hop)
        total = sum(nnf.pad(rows[:, :, j], (0, 0, j, parts - 1 - j)) for j in range(parts))
        start = (n - self.hop) // 2
        return total.reshape(G, -1)[:, start : start + F * self.hop]  # type: ignore[union-attr]


class MelFrontEnd(nn.Module):
    """Causal encoder, and a decoder that looks ``decode_lookahead`` samples ahead (15 ms)."""

    whole_items = False  # an item's ids are those that it has alone, whatever stands behind its end
    fills_end = False  # takes whole frames

    def __init__(self, config: MelFrontEndConfig, d_code: int, sample_rate: int):
        super().__init__()
        c, self.config, self.sample_rate = config, config, sample_rate
        self.samples_per_frame = c.samples_per_frame
        self.encode_lookahead, self.decode_lookahead = 0, (c.n_fft - c.hop) // 2
        self.mel_in = CausalConv1d(c.n_mels, c.width, 3)
        self.down = CausalConv1d(c.width, c.width, 2 * c.downsample, stride=c.downsample)
        self.encoder = nn.ModuleList(ConvNeXt(c.width, c.hidden) for _ in range(c.encoder_blocks))
        self.to_code = Dense(c.width, d_code)
        self.from_code = CausalConv1d(d_code, c.width, 3)
        self.decoder = nn.ModuleList(ConvNeXt(c.width, c.hidden) for _ in range(c.decoder_blocks))
        self.up = Dense(c.width, c.width * c.downsample)
        self.synthesis = nn.ModuleList(
            ConvNeXt(c.width, c.hidden) for _ in range(c.synthesis_blocks)
        )
        self.norm = LayerNorm(c.width)
        self.head = IstftHead(c.width, c.n_fft, c.hop)

    def spectra(self, wave_GN: Tensor, stream: Stream | None = None) -> Tensor:
        """Causal log-mel spectra (G, n_mels, N / hop), scaled to about [-1, 1].

        Spectrum i ends with sample (i + 1) * hop.
        """
        c, left = self.config, self.config.n_fft - self.config.hop
        if stream is not None:  # the samples before this chunk stand in for the zeros on the left
            past = stream.get(self, wave_GN.new_zeros(wave_GN.shape[0], left))
            wave_GN = torch.cat([past, wave_GN], dim=1)
            stream[self], left = wave_GN[:, -left:], 0
        mel = log_mel(
            wave_GN,
            sample_rate=self.sample_rate,
            n_mels=c.n_mels,
            n_fft=c.n_fft,
            hop=c.hop,
            left=left,
            floor=1e-4,
        )
        mel = mel[:, : (wave_GN.shape[1] - (0 if left else c.n_fft - c.hop)) // c.hop]
        return ((mel + 5.0) / 4.0).transpose(1, 2)

    def encode(self, wave_GN: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, N) with N a multiple of `samples_per_frame` -> (G, F, d_code)."""
        with torch.autocast(wave_GN.device.type, enabled=False):
            mel = self.spectra(wave_GN, stream)
        h = self.down(nnf.gelu(self.mel_in(mel, stream)), stream).transpose(1, 2)
        for block in self.encoder:
            h = block(h, stream)
        return self.to_code(h)

    def decode(self, z_GFD: Tensor, valid_GF: Tensor) -> Tensor:
        """(G, F, d_code) -> (G, F * samples_per_frame)."""
        h = self.from_code(z_GFD.transpose(1, 2)).transpose(1, 2)
        for block in self.decoder:
            h = block(h)
        G, F, D = h.shape
        h = self.up(h).view(G, F * self.config.downsample, D)
        for block in self.synthesis:
            h = block(h)
        return self.head(self.norm(h), valid_GF.repeat_interleave(self.config.downsample, dim=1))
