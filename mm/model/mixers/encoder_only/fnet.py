"""Fourier mixing.

R rows of one document, L tokens, D model.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.layer_config import LayerConfig
from mm.model.mixers.encoder_only.base import BothWays
from mm.registry import MIXERS


class FNet(BothWays):
    """``Re(FFT_places(FFT_channels(x)))`` of each document, without parameters.

    Source: Lee-Thorp et al. 2021 (arXiv:2105.03824), eq. 3.
    """

    def __init__(self, d_model: int, config: FNetConfig, linear: LinearFactory):
        super().__init__()
        self.unitary = config.unitary

    def mix(self, x_RLD: Tensor, length_R: Tensor, ctx: Ctx) -> Tensor:
        wide = torch.promote_types(x_RLD.dtype, torch.float32)
        with torch.autocast(x_RLD.device.type, enabled=False):
            f = self._places(torch.fft.fft(x_RLD.to(wide), dim=-1), length_R, ctx)
        if self.unitary:
            scale = (length_R.clamp_min(1) * x_RLD.shape[-1]).to(wide).rsqrt()
            f = f * scale[:, None, None]
        return f.to(x_RLD.dtype)

    def _places(self, f: Tensor, length_R: Tensor, ctx: Ctx) -> Tensor:
        """Real part of the transform of complex `(R, L, D)` over the first ``length`` positions."""
        if torch.compiler.is_compiling():  # a graph knows no lengths
            c, s = dft(length_R, f.shape[1], f.real.dtype)
            return c @ f.real + s @ f.imag
        y = torch.zeros_like(f.real)
        lengths = ctx.layout.arrays().length[: len(f)]
        for n in np.unique(lengths).tolist():  # documents of one length at a time
            rows = torch.from_numpy(np.flatnonzero(lengths == n)).to(f.device)
            part = torch.fft.fft(f[rows, :n], dim=1).real if n else f.real[rows, :n]
            pad = y.new_zeros(len(rows), f.shape[1] - n, f.shape[2])
            y = y.index_copy(0, rows, torch.cat((part, pad), dim=1))
        return y


def dft(length_R: Tensor, L: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(R, L, L)` of ``2 pi i j / length``, zeros from the length on."""
    at = torch.arange(L, device=length_R.device)
    n = length_R.clamp_min(1)[:, None, None]
    turn = (at[:, None] * at) % n  # whole turns taken off while they are integers
    angle = turn.to(torch.float64) * (2 * math.pi) / n
    valid = (at[:, None] < n) & (at < n)
    return tuple(f(angle).masked_fill(~valid, 0).to(dtype) for f in (torch.cos, torch.sin))  # type: ignore[return-value]


@MIXERS.register("fnet")
class FNetConfig(LayerConfig):
    """Fourier mixing of positions and channels; bidirectional."""

    kind: Literal["fnet"] = "fnet"
    unitary: bool = False  # transforms keep lengths; False: as in the paper

    layer = FNet
