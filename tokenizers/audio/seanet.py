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
from mm.tokenizers.audio.layers import CausalConv1d, CausalConvTranspose1d, Stream


class SeanetFrontEndConfig(Config):
    """Waveform in, waveform out. One latent frame stands for the product of ``strides`` samples.

    EnCodec at 24 kHz: strides (2, 4, 5, 8), width 32, lstm_layers 2, d_code 128: 75 frames a
    second.
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
    lstm_layers: Annotated[int, Field(ge=0)] = 0

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.strides)

    def build(self, d_code: int, sample_rate: int) -> SeanetFrontEnd:
        return SeanetFrontEnd(self, d_code)


class ResidualUnit(nn.Module):
    """ELU, dilated convolution to half the channels, ELU, 1x1 convolution back; identity skip."""

    def __init__(self, c: int, dilation: int):
        super().__init__()
        self.narrow = CausalConv1d(c, c // 2, 3, dilation=dilation)
        self.widen = CausalConv1d(c // 2, c, 1)

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        return x_GCT + self.widen(nnf.elu(self.narrow(nnf.elu(x_GCT), stream)), stream)


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
        before = None if stream is None or self not in stream else tuple(stream[self].unbind(0))
        y, after = self.cell(x_GCT.transpose(1, 2), before)
        if stream is not None:
            stream[self] = torch.stack(after)
        return x_GCT + y.transpose(1, 2)


class SeanetFrontEnd(nn.Module):
    """Causal on both sides: encoder and decoder look no sample ahead of the latent frame at hand.

    Source: Defossez et al., "High Fidelity Neural Audio Compression" (2210.13438) section 3.1.
    Weight normalisation is left out (its two-tensor form does not survive ZeRO-3's flat shards) and
    padding is zeros, not reflection.
    """

    encode_lookahead = 0
    decode_lookahead = 0

    def __init__(self, config: SeanetFrontEndConfig, d_code: int):
        super().__init__()
        c, width = config, config.width
        self.config, self.samples_per_frame = config, config.samples_per_frame
        self.first = CausalConv1d(1, width, c.kernel)
        self.encoder_units, self.downs = nn.ModuleList(), nn.ModuleList()
        for stride in c.strides:
            self.encoder_units.append(
                nn.ModuleList(ResidualUnit(width, n) for n in c.residual_dilations)
            )
            self.downs.append(CausalConv1d(width, 2 * width, 2 * stride, stride=stride))
            width *= 2
        self.encoder_lstm = Lstm(width, c.lstm_layers) if c.lstm_layers else None
        self.to_code = CausalConv1d(width, d_code, c.kernel)
        self.from_code = CausalConv1d(d_code, width, c.kernel)
        self.decoder_lstm = Lstm(width, c.lstm_layers) if c.lstm_layers else None
        self.ups, self.decoder_units = nn.ModuleList(), nn.ModuleList()
        for stride in reversed(c.strides):
            self.ups.append(CausalConvTranspose1d(width, width // 2, stride))
            width //= 2
            self.decoder_units.append(
                nn.ModuleList(ResidualUnit(width, n) for n in c.residual_dilations)
            )
        self.last = CausalConv1d(width, 1, c.kernel)

    def init_weights(self) -> None:
        with torch.no_grad():  # start quiet: a loud start teaches silence first
            self.last.weight.mul_(0.1)

    def encode(self, wave_GN: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, N) with N a multiple of `samples_per_frame` -> (G, F, d_code)."""
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
