"""Linear attention over binary codes.

B rows, T tokens, H heads, K head width, A anchors, b bits.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.layer import LinearFactory
from mm.model.layer_config import EvenHeadsConfig
from mm.model.mixers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from mm.model.mixers.linear_attention.memory import MatrixMemory
from mm.registry import MIXERS


def signs(x: Tensor) -> Tensor:
    """-1 or 1; the gradient passes where ``|x| <= 1`` (straight-through)."""
    hard = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    soft = x.clamp(-1, 1)
    return hard + (soft - soft.detach())  # exactly -1 or 1


class EcoFormer(LinearAttention):
    """Linear attention whose similarity is the share of equal bits of learned hash codes.

    ``h_r(x) = sign(sum_i a_ri kappa(x_i, x) + c_r)`` with learned anchors ``x_i`` and a Gaussian
    kernel; ``H(q) . H(k) = b - 2 * Hamming distance``, so ``phi(q) . phi(k) = (b + H(q) . H(k)) /
    2`` with ``phi(x) = [1 + H(x), 1 - H(x)] / 2`` counts the equal bits: never negative, a whole
    number without rounding (none may be equal), and codes need additions only. Here all parameters
    learn end to end, straight through the signs; the authors fit a and c to pairs of high and low
    attention first (`hash_loss`).

    Source: Liu et al. 2022 (arXiv:2209.09004), section 4.
    """

    def __init__(self, d_model: int, own: EcoFormerConfig, linear: LinearFactory):
        base = LinearAttentionConfig(heads=own.heads, feature="relu", normalise=True)
        super().__init__(d_model, base, linear)
        key_dim = self.key_dim
        self.memory = MatrixMemory(own.heads, 2 * own.bits, key_dim + 1)
        self.anchors = nn.Parameter(torch.empty(own.heads, own.anchors, key_dim))
        self.mix = nn.Parameter(torch.empty(own.heads, own.anchors, own.bits))
        self.shift = nn.Parameter(torch.empty(own.heads, own.bits))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.anchors)
        nn.init.normal_(self.mix, std=self.mix.shape[1] ** -0.5)
        nn.init.zeros_(self.shift)

    def hash_values(self, x: Tensor) -> Tensor:
        """`(B, T, H, K)` to what the signs are taken of, `(B, T, H, b)`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y, anchors, K = x.to(wide), self.anchors.to(wide), x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            # |x - a|^2 by its three terms: the differences would be `(B, T, H, A, K)`.
            both = torch.einsum("bthk,hak->btha", y, anchors) * (2 / K)
            apart = y.square().mean(-1, keepdim=True) + anchors.square().mean(-1) - both
            kernel = (-apart / 2).exp().to(x.dtype)
        # Centred: kernel values are positive, and signs should not be all alike.
        kernel = kernel - kernel.mean(-1, keepdim=True)
        return torch.einsum("btha,har->bthr", kernel, self.mix.to(x)) + self.shift.to(x)

    def _map(self, x: Tensor) -> Tensor:
        # A rounded hash value may have the other sign.
        codes = signs(self.hash_values(x.to(torch.promote_types(x.dtype, torch.float32))))
        return torch.cat((1 + codes, 1 - codes), -1) / 2


def hash_loss(codes_q: Tensor, codes_k: Tensor, attention: Tensor, pairs: int) -> Tensor:
    """Mean squared difference of code similarities from those that attention weights ask for.

    Asked for are 1 for the ``pairs`` largest weights of each query, -1 for the smallest.

    Args:
        codes_q: `(..., T, b)` relaxed codes in [-1, 1] (`tanh` of `EcoFormer.hash_values`).
        codes_k: `(..., S, b)`.
        attention: `(..., T, S)` weights of the attention to be imitated.
        pairs: how many of each kind, at most S / 2.
    Returns:
        scalar.
    Source: Liu et al. 2022 (arXiv:2209.09004), section 4 (self-supervised labels of top and bottom
    pairs).
    """
    similar = codes_q @ codes_k.transpose(-1, -2) / codes_q.shape[-1]
    top = similar.gather(-1, attention.topk(pairs, -1).indices)
    low = similar.gather(-1, attention.topk(pairs, -1, largest=False).indices)
    return ((top - 1).square().mean() + (low + 1).square().mean()) / 2


@MIXERS.register("ecoformer")
class EcoFormerConfig(EvenHeadsConfig):
    """Linear attention over learned binary codes."""

    kind: Literal["ecoformer"] = "ecoformer"
    bits: Annotated[int, Field(gt=0)] = 16
    anchors: Annotated[int, Field(gt=0, description="of the hash functions' kernels")] = 25

    layer = EcoFormer
    small = {"heads": 2, "bits": 5, "anchors": 4}
