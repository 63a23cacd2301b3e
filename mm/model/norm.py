"""RMSNorm and LayerNorm with what they learn. D width of what is normed."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Norm over the last dimension, of width ``d``."""

    def __init__(self, d: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(RMSNorm):
    """Norm of mean 0 and variance 1 over the last dimension, with scale and shift.

    Source: Ba et al. 2016 (arXiv:1607.06450), eq. 4.
    """

    def __init__(self, d: int, eps: float = 1e-6):
        super().__init__(d, eps)
        self.bias = nn.Parameter(torch.empty(d))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), weight.shape, weight, bias, self.eps).to(x.dtype)


class HeadNorm(nn.Module):
    """RMSNorm of each head `(..., H, K)`, with scales of its own."""

    def __init__(self, heads: int, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width))
        self.eps = eps

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        plain = rms_norm(x, self.weight.new_ones(x.shape[-1]), self.eps)
        return (plain * self.weight).to(x.dtype)


Kind = Literal["rms", "layer"]


def norm(kind: Kind, d: int, eps: float) -> RMSNorm:
    """`(..., D)` to the same."""
    return LayerNorm(d, eps) if kind == "layer" else RMSNorm(d, eps)
