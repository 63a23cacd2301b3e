"""Attention through landmarks.

R rows of one document, L tokens, D model, H heads, K head width, m landmarks.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.layer_config import EvenHeadsConfig
from mm.model.mixers.encoder_only.base import BothWays, valid_of
from mm.registry import MIXERS


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse of `(..., m, m)` by iteration; zero rows and columns stay zero.

    Source: Xiong et al. 2021 (arXiv:2102.03902), the iteration of Razavi et al. 2014; the
    start is scaled by each matrix's own norms, so that rows do not depend on each other.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    norms = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
    z = a.transpose(-1, -2) / norms[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


class Nystromformer(BothWays):
    """``softmax(Q k~^T) softmax(q~ k~^T)^+ softmax(q~ K^T) V + conv(V)``.

    The landmarks ``q~, k~`` are means of m even segments of the document (each token its own where
    there are fewer).

    Source: Xiong et al. 2021 (arXiv:2102.03902), section 3 (the skip: one filter a head).
    """

    def __init__(self, d_model: int, config: NystromformerConfig, linear: LinearFactory):
        super().__init__()
        self.heads, self.landmarks = config.heads, config.landmarks
        self.iterations = config.iterations
        self.qkv = linear(d_model, 3 * d_model, "qkv")
        self.out = linear(d_model, d_model, "out")
        self.filter = (
            nn.Parameter(torch.empty(config.heads, config.conv_size)) if config.conv_size else None
        )

    def init_weights(self) -> None:
        if self.filter is not None:
            nn.init.normal_(self.filter, std=self.filter.shape[1] ** -0.5)

    def mix(self, x_RLD: Tensor, length_R: Tensor, ctx: Ctx) -> Tensor:
        (R, L, D), H, there = x_RLD.shape, self.heads, self.of_rows(ctx)
        valid = valid_of(length_R, L)
        q, k, v = self.qkv(x_RLD, there).view(R, L, 3, H, D // H).permute(2, 0, 3, 1, 4)
        wide = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):
            # A linear map without bias keeps zeros, but another plug may not.
            q, k, v = (t.to(wide).masked_fill(~valid[:, None, :, None], 0) for t in (q, k, v))
            y = self._attended(q * (D // H) ** -0.5, k, v, valid)
            if self.filter is not None:
                y = y + self._filtered(v)
        return self.out(y.transpose(1, 2).reshape(R, L, D).to(x_RLD.dtype), there)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        n = valid.sum(1)[:, None]
        m = n.clamp_max(self.landmarks)
        at = torch.arange(valid.shape[1], device=v.device)
        marks = torch.arange(min(self.landmarks, valid.shape[1]), device=v.device)
        member = ((at * m // n)[:, None] == marks[:, None]) & valid[:, None]  # (R, m, L)
        mean = member.to(v.dtype) / member.sum(-1, keepdim=True).clamp_min(1)
        here = (marks < m)[:, None]  # (R, 1, m)
        q_mark, k_mark = mean[:, None] @ q, mean[:, None] @ k
        soft = lambda logits, seen: logits.masked_fill(~seen[:, :, None], -math.inf).softmax(-1)
        a = soft(q_mark @ k_mark.transpose(-1, -2), here).masked_fill(~here[..., None], 0)
        left = soft(q @ k_mark.transpose(-1, -2), here)
        right = soft(q_mark @ k.transpose(-1, -2), valid[:, None])
        return left @ (pseudo_inverse(a, self.iterations) @ (right @ v))

    def _filtered(self, v: Tensor) -> Tensor:
        """One filter a head over positions. ``v`` `(R, H, L, K)`."""
        assert self.filter is not None
        R, H, L, K = v.shape
        conv_size = self.filter.shape[1]
        u = F.pad(
            v.permute(0, 3, 1, 2).reshape(R * K, H, L), (conv_size // 2, (conv_size - 1) // 2)
        )
        y = F.conv1d(u, self.filter.to(v.dtype)[:, None], groups=H)
        return y.view(R, K, H, L).permute(0, 2, 3, 1)


@MIXERS.register("nystromformer")
class NystromformerConfig(EvenHeadsConfig):
    """Nystroem approximation of attention; bidirectional."""

    kind: Literal["nystromformer"] = "nystromformer"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    landmarks: Annotated[int, Field(gt=0)] = 64
    iterations: Annotated[int, Field(gt=0, description="of the pseudo-inverse")] = 6
    conv_size: int = Field(default=33, ge=0, description="of the convolution beside it; 0 = none")

    layer = Nystromformer
    small = {"heads": 2, "landmarks": 3, "conv_size": 3}
