"""SEANet: the causal convolutional waveform encoder and decoder of EnCodec.

G items, C channels, N samples, F frames.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as nnf
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.tokenizers.audio.layers import (
    CausalConv1d,
    CausalConvTranspose1d,
    CentredConv1d,
    CentredConvTranspose1d,
    Padding,
    Stream,
)


class SeanetFrontEndConfig(Config):
    """Waveform in, waveform out. One latent frame stands for the product of ``strides`` samples.

    EnCodec at 24 kHz: strides (2, 4, 5, 8), width 32, lstm_layers 2, d_code 128, shortcut, padding
    reflect, end layers: 75 frames a second.
    """

    kind: Literal["seanet"] = "seanet"
    strides: Annotated[tuple[int, ...], Field(min_length=1, description="encoder order")] = (
        4,
        4,
        5,
        8,
    )
    width: Annotated[
        int, Field(gt=1, description="channels at the sample rate; doubled by every stride")
    ] = 16
    residual_dilations: tuple[int, ...] = (1,)
    kernel: Annotated[int, Field(gt=0, description="first and last convolution")] = 7
    last_kernel: int | None = Field(
        default=None, gt=0, description="of the last one of each side; default: kernel"
    )
    residual_kernel: Annotated[int, Field(gt=0, description="of a residual unit")] = 3
    compress: Annotated[int, Field(gt=0, description="a unit's channels are divided by it")] = 2
    shortcut: Annotated[bool, Field(description="a 1x1 convolution beside each unit")] = False
    lstm_layers: Annotated[int, Field(ge=0)] = 0
    causal: Annotated[bool, Field(description="false: half of each context lies ahead")] = True
    padding: Annotated[Padding, Field(description="beyond a signal's borders")] = "zeros"
    end: Literal["signal", "layers"] = Field(
        default="signal",
        description="what fills a last frame: zeros behind the signal, or each layer its own input",
    )

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.strides)

    @property
    def convolution(self) -> type[CausalConv1d]:
        """Its kind of convolution."""
        return CausalConv1d if self.causal else CentredConv1d

    def build(self, d_code: int, sample_rate: int) -> SeanetFrontEnd:
        return SeanetFrontEnd(self, d_code)


class ResidualUnit(nn.Module):
    """ELU, dilated convolution to fewer channels, ELU, 1x1 convolution back; a skip around them."""

    def __init__(self, c: int, dilation: int, config: SeanetFrontEndConfig):
        super().__init__()
        conv, inner = config.convolution, c // config.compress
        kernel, padding = config.residual_kernel, config.padding
        self.narrow = conv(c, inner, kernel, dilation=dilation, padding=padding)
        self.widen = conv(inner, c, 1)
        self.shortcut = conv(c, c, 1) if config.shortcut else None

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        skip = x_GCT if self.shortcut is None else self.shortcut(x_GCT, stream)
        return skip + self.widen(nnf.elu(self.narrow(nnf.elu(x_GCT), stream)), stream)


class Lstm(nn.Module):
    """Recurrent layers over frames with a skip around them."""

    def __init__(self, c: int, n_layers: int):
        super().__init__()
        self.cell = nn.LSTM(c, c, n_layers, batch_first=True)

    def init_weights(self) -> None:
        for p in self.cell.parameters():
            nn.init.uniform_(
                p, -1 / math.sqrt(self.cell.hidden_size), 1 / math.sqrt(self.cell.hidden_size)
            )

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        y, after = self.cell(x_GCT.transpose(1, 2), None if stream is None else stream.get(self))
        if stream is not None:
            stream[self] = after
        return x_GCT + y.transpose(1, 2)


class SeanetFrontEnd(nn.Module):
    """Encoder and decoder look no sample ahead of the latent frame at hand, where they are causal.

    Source: Defossez et al., "High Fidelity Neural Audio Compression" (2210.13438) section 3.1.
    Weight normalisation is left out (its two-tensor form does not survive ZeRO-3's flat shards).
    """

    def __init__(self, config: SeanetFrontEndConfig, d_code: int):
        super().__init__()
        c, width, conv = config, config.width, config.convolution
        up = CausalConvTranspose1d if c.causal else CentredConvTranspose1d
        last = c.last_kernel or c.kernel
        self.config, self.samples_per_frame = config, config.samples_per_frame
        self.encode_lookahead = self.decode_lookahead = 0 if c.causal else None
        self.whole_items = c.end == "layers" or not c.causal
        self.fills_end = c.end == "layers"
        self.first = conv(1, width, c.kernel, padding=c.padding)
        self.encoder_units, self.downs = nn.ModuleList(), nn.ModuleList()
        for stride in c.strides:
            self.encoder_units.append(
                nn.ModuleList(ResidualUnit(width, n, c) for n in c.residual_dilations)
            )
            self.downs.append(conv(width, 2 * width, 2 * stride, stride, padding=c.padding))
            width *= 2
        self.encoder_lstm = Lstm(width, c.lstm_layers) if c.lstm_layers else None
        self.to_code = conv(width, d_code, last, padding=c.padding)
        self.from_code = conv(d_code, width, c.kernel, padding=c.padding)
        self.decoder_lstm = Lstm(width, c.lstm_layers) if c.lstm_layers else None
        self.ups, self.decoder_units = nn.ModuleList(), nn.ModuleList()
        for stride in reversed(c.strides):
            self.ups.append(up(width, width // 2, stride))
            width //= 2
            self.decoder_units.append(
                nn.ModuleList(ResidualUnit(width, n, c) for n in c.residual_dilations)
            )
        self.last = conv(width, 1, last, padding=c.padding)

    def init_weights(self) -> None:
        with torch.no_grad():  # start quiet: a loud start teaches silence first
            self.last.weight.mul_(0.1)

    def encode(self, wave_GN: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, N) -> (G, F, d_code), F = ceil(N / samples_per_frame).

        Chunks of a ``stream`` are multiples of `samples_per_frame`.
        """
        h = self.first(wave_GN[:, None], stream)
        for units, down in zip(self.encoder_units, self.downs, strict=True):
            for unit in units:  # type: ignore[union-attr]
                h = unit(h, stream)
            h = down(nnf.elu(h), stream)
        if self.encoder_lstm is not None:
            h = self.encoder_lstm(h, stream)
        return self.to_code(nnf.elu(h), stream).transpose(1, 2)

    def decode(self, z_GFD: Tensor, valid_GF: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, F, d_code) -> (G, F * samples_per_frame).

        ``valid`` is not needed: nothing looks ahead.
        """
        h = self.from_code(z_GFD.transpose(1, 2), stream)
        if self.decoder_lstm is not None:
            h = self.decoder_lstm(h, stream)
        for up, units in zip(self.ups, self.decoder_units, strict=True):
            h = up(nnf.elu(h), stream)
            for unit in units:  # type: ignore[union-attr]
                h = unit(h, stream)
        wave = self.last(nnf.elu(h), stream)[:, 0]
        return wave.to(torch.promote_types(wave.dtype, torch.float32))
