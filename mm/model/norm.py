"""RMSNorm with a learned scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Norm over the last dimension. ``shape`` of the scale: `(D,)`, or `(H, K)` for a scale of each head."""

    def __init__(self, *shape: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps = eps

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
