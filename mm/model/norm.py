"""RMSNorm with a learned scale."""

from __future__ import annotations

import torch
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
