"""RMSNorm and LayerNorm, most with what they learn. D width of what is normed."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.kernels import device
from mm.kernels.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Norm over the last dimension, of width ``d``."""

    adds = True  # takes a branch, too

    def __init__(self, d: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def scale(self) -> Tensor:
        """`(D,)` factors of what is normed."""
        return self.weight

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Any:
        """Return ``x`` normed; with a branch, ``x + branch`` and that normed."""
        if branch is None:
            return rms_norm(x, self.scale(), self.eps)
        return add_rms_norm(x, branch, self.scale(), self.eps)


class LayerNorm(RMSNorm):
    """Norm of mean 0 and variance 1 over the last dimension, with scale and shift.

    Source: Ba et al. 2016 (arXiv:1607.06450), eq. 4.
    """

    adds = False

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


class NonParametricNorm(nn.Module):
    """Norm of mean 0 and variance 1 over the last dimension, which learns nothing.

    Source: OLMo (arXiv:2402.00838), section 2.1.
    """

    adds = False

    def __init__(self, d: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), x.shape[-1:], eps=self.eps).to(x.dtype)


class ZeroCentredNorm(RMSNorm):
    """RMSNorm whose scale is ``1 + weight``.

    Source: Gemma (arXiv:2403.08295), as in its code; weight decay then pulls the scale to 1.
    """

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def scale(self) -> Tensor:
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


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


class FullNorm(RMSNorm):
    """RMSNorm over all heads of `(..., H, K)` together, as OLMo 2 norms queries and keys.

    Source: OLMo 2 (arXiv:2501.00656), section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.flatten(-2), self.weight, self.eps).view(x.shape)


Kind = Literal["rms", "layer", "zero_centred", "nonparametric"]
Norm = RMSNorm | NonParametricNorm
NORMS: dict[Kind, type[Norm]] = {
    "rms": RMSNorm,
    "layer": LayerNorm,
    "zero_centred": ZeroCentredNorm,
    "nonparametric": NonParametricNorm,
}


def norm(kind: Kind, d: int, eps: float) -> Norm:
    """`(..., D)` to the same."""
    return NORMS[kind](d, eps)


def add_norm(norm: Norm | None, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """``x + branch`` and what is read of it: normed, or as it is; `(..., D)` both.

    On a GPU one kernel does both; elsewhere the norm alone is one.
    """
    if norm is not None and norm.adds and x.device.type == device.KIND:
        return norm(x, branch)
    total = x + branch
    return total, total if norm is None else norm(total)
