"""MS-STFT critic: judges the complex spectrogram at several resolutions.

G items, N samples, C channels, T frames, W bins.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as nnf
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Batch
from mm.config import Config
from mm.model.layer import ModelOut
from mm.registry import NETWORKS
from mm.tokenizers.audio.losses import valid_samples
from mm.tokenizers.audio.mel import frames, hann_window

DILATIONS = (1, 2, 4)


class Conv2d(nn.Module):
    """Convolution over (frames, bins), "same" along frames, leaky-ReLU gain in its start."""

    def __init__(
        self, c_in: int, c_out: int, kernel: tuple[int, int], stride: int = 1, dilation: int = 1
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_out, c_in, *kernel))
        self.bias = nn.Parameter(torch.empty(c_out))
        self.stride, self.dilation = (1, stride), (dilation, 1)
        self.padding = ((kernel[0] - 1) * dilation // 2, (kernel[1] - 1) // 2)

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.weight, std=math.sqrt(1.9 / self.weight[0].numel()))
        nn.init.zeros_(self.bias)

    def forward(self, x_GCTW: Tensor) -> Tensor:
        return nnf.conv2d(x_GCTW, self.weight, self.bias, self.stride, self.padding, self.dilation)


class StftCritic(nn.Module):
    """One resolution: complex spectrum through strided convolutions to a score a (frame, band)."""

    def __init__(self, n_fft: int, width: int):
        super().__init__()
        self.n_fft, self.hop = n_fft, n_fft // 4
        self.layers = nn.ModuleList([Conv2d(2, width, (3, 9))])
        self.layers.extend(Conv2d(width, width, (3, 9), stride=2, dilation=d) for d in DILATIONS)
        self.layers.append(Conv2d(width, width, (3, 3)))
        self.score = Conv2d(width, 1, (3, 3))

    def forward(self, wave_GN: Tensor, length_G: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores (G, T, W) and the features (G, C, T, W_j) before them.

        Frames beyond an item's end are exactly 0.
        """
        with torch.autocast(wave_GN.device.type, enabled=False):
            window = hann_window(self.n_fft, torch.float32, wave_GN.device)
            pieces = frames(wave_GN.float(), self.n_fft, self.hop, self.n_fft // 2) * window
            spectrum = torch.fft.rfft(pieces) / window.square().sum().sqrt()
        h = torch.stack([spectrum.real, spectrum.imag], dim=1)
        valid = valid_samples((length_G + self.hop - 1) // self.hop, h.shape[2])[:, None, :, None]
        features = []
        for layer in self.layers:
            h = nnf.leaky_relu(layer(h), 0.2) * valid
            features.append(h)
        return (self.score(h) * valid)[:, 0], features


class MsStftCritic(nn.Module):
    """Several STFT resolutions side by side.

    Source: Defossez et al. 2022, arXiv:2210.13438, section 3.4, figure 2. Weight normalisation is
    left out, as in the codec.
    """

    def __init__(self, config: MsStftCriticConfig):
        super().__init__()
        self.config = config
        self.scales = nn.ModuleList(StftCritic(n_fft, config.width) for n_fft in config.windows)

    def forward(self, batch: Batch, **_: Any) -> ModelOut:
        """Judge ``batch.values[modality]``: data (G, N) float32, length (G,) samples.

        Returns:
            intermediates: "score.<i>" (G, T_i, W_i) of resolution i, higher is more real;
            "feature.<i>.<j>"
                (G, C, T_i, W_ij).
        """
        values = batch.values[self.config.modality]
        wave = values.data * valid_samples(values.length, values.data.shape[1])
        intermediates: dict[str, Tensor] = {}
        for i, scale in enumerate(self.scales):
            score, features = scale(wave, values.length)
            intermediates[f"score.{i}"] = score
            intermediates |= {f"feature.{i}.{j}": feature for j, feature in enumerate(features)}
        return ModelOut(intermediates["score.0"], {}, None, intermediates, {})


@NETWORKS.register("ms_stft_critic")
class MsStftCriticConfig(Config):
    """EnCodec's has windows (2048, 1024, 512, 256, 128) and width 32."""

    kind: Literal["ms_stft_critic"] = "ms_stft_critic"
    modality: str = "audio"
    windows: Annotated[
        tuple[int, ...], Field(min_length=1, description="STFT lengths in samples")
    ] = (1024, 512, 256)
    width: Annotated[int, Field(gt=0)] = 16

    def build(self, vocabulary: Any = None) -> MsStftCritic:
        """Allocate the network; `mm.model.layer.init_weights` fills it."""
        return MsStftCritic(self)

    @classmethod
    def smallest(cls) -> MsStftCriticConfig:
        return cls(windows=(64, 32), width=4)
