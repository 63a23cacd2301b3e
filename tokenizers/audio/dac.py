"""The convolutional waveform encoder and decoder of the Descript Audio Codec.

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
from mm.tokenizers.audio.layers import CausalConvTranspose1d, CentredConv1d, Stream, refuse_stream

DILATIONS = (1, 3, 9)


class DacFrontEndConfig(Config):
    """Waveform in, waveform out, both sides see what lies ahead.

    DAC at 16 and 24 kHz: strides (2, 4, 5, 8), width 64, decoder_width 1536.
    """

    kind: Literal["dac"] = "dac"
    strides: Annotated[tuple[int, ...], Field(min_length=1, description="encoder order")] = (
        2,
        4,
        5,
        8,
    )
    width: Annotated[
        int, Field(gt=0, description="at the sample rate; doubled by every stride")
    ] = 64
    decoder_width: Annotated[
        int, Field(gt=0, description="at the frame rate; halved by every stride")
    ] = 1536

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.strides)

    def build(self, d_code: int, sample_rate: int) -> DacFrontEnd:
        return DacFrontEnd(self, d_code)


class Snake(nn.Module):
    """``x + sin(alpha x)^2 / alpha``, alpha by channel.

    Source: Liu et al. 2020 (arXiv:2006.08195), eq. 1.
    """

    def __init__(self, c: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, c, 1))

    def init_weights(self) -> None:
        nn.init.ones_(self.alpha)

    def forward(self, x_GCT: Tensor) -> Tensor:
        return x_GCT + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x_GCT).square()


class DacUnit(nn.Module):
    """Snake, dilated convolution, Snake, 1x1 convolution; an identity skip."""

    def __init__(self, c: int, dilation: int):
        super().__init__()
        self.before, self.dilated = Snake(c), CentredConv1d(c, c, 7, dilation=dilation)
        self.between, self.mix = Snake(c), CentredConv1d(c, c, 1)

    def forward(self, x_GCT: Tensor) -> Tensor:
        return x_GCT + self.mix(self.between(self.dilated(self.before(x_GCT))))


class DacConvTranspose1d(CausalConvTranspose1d):
    """Transposed convolution that drops as many steps before as behind: an odd stride loses one."""

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        refuse_stream(stream)
        y, cut = self._spread(x_GCT), -(-self.stride // 2)
        return y[..., cut : y.shape[-1] - cut]


class DacFrontEnd(nn.Module):
    """Encoder: units and strides; decoder: the mirror image, and tanh.

    Source: Kumar et al. 2023, "High-Fidelity Audio Compression with Improved RVQGAN"
    (arXiv:2306.06546), section 3 and appendix A. Weight normalisation is left out, as in SEANet.
    """

    encode_lookahead = decode_lookahead = None  # some frames; not declared
    whole_items = True  # what stands behind an item's end is seen
    fills_end = False

    def __init__(self, config: DacFrontEndConfig, d_code: int):
        super().__init__()
        c, width = config, config.width
        self.config, self.samples_per_frame = config, config.samples_per_frame
        units = lambda n: nn.Sequential(*(DacUnit(n, d) for d in DILATIONS))
        self.first = CentredConv1d(1, width, 7)
        self.encoder_units, self.encoder_snakes = nn.ModuleList(), nn.ModuleList()
        self.downs = nn.ModuleList()
        for stride in c.strides:
            self.encoder_units.append(units(width))
            self.encoder_snakes.append(Snake(width))
            self.downs.append(CentredConv1d(width, 2 * width, 2 * stride, stride))
            width *= 2
        self.encoder_snake, self.to_code = Snake(width), CentredConv1d(width, d_code, 3)
        width = c.decoder_width
        self.from_code = CentredConv1d(d_code, width, 7)
        self.decoder_units, self.decoder_snakes = nn.ModuleList(), nn.ModuleList()
        self.ups = nn.ModuleList()
        for stride in reversed(c.strides):
            self.decoder_snakes.append(Snake(width))
            self.ups.append(DacConvTranspose1d(width, width // 2, stride))
            width //= 2
            self.decoder_units.append(units(width))
        self.decoder_snake, self.last = Snake(width), CentredConv1d(width, 1, 7)

    def encode(self, wave_GN: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, N) with N a multiple of `samples_per_frame` -> (G, F, d_code)."""
        refuse_stream(stream)
        h = self.first(wave_GN[:, None])
        for units, snake, down in zip(
            self.encoder_units, self.encoder_snakes, self.downs, strict=True
        ):
            h = down(snake(units(h)))
        return self.to_code(self.encoder_snake(h)).transpose(1, 2)

    def decode(self, z_GFD: Tensor, valid_GF: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, F, d_code) -> (G, F * samples_per_frame); zeros where odd strides lost samples."""
        refuse_stream(stream)
        h = self.from_code(z_GFD.transpose(1, 2))
        for snake, up, units in zip(self.decoder_snakes, self.ups, self.decoder_units, strict=True):
            h = units(up(snake(h)))
        wave = self.last(self.decoder_snake(h))[:, 0].tanh()
        wave = nnf.pad(wave, (0, z_GFD.shape[1] * self.samples_per_frame - wave.shape[1]))
        return wave.to(torch.promote_types(wave.dtype, torch.float32))
