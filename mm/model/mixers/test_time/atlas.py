"""Windowed test-time memory with a Muon step.

B rows, T tokens, D model, H heads, K key width, F feature width, V value width, R rows of one
document, C tokens of a mini-batch, P = window - 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Out
from mm.model.layer_config import EvenHeadsConfig
from mm.model.mixers.test_time.base import Learner, Tensors
from mm.registry import MIXERS
from mm.state import State

EPS = 1e-6
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, Muon


class Atlas(Learner):
    """``M_t = alpha_t M_{t-1} - eta_t NS(S_t)``, read ``phi(q_t) M_t``.

    ``S_t = theta_t S_{t-1} + sum_{i = t-P..t} gamma_i grad |phi(k_i) M - v_i|^2 / 2``: the memory
    is fitted to a window of tokens, and NS (Newton-Schulz) makes its momentum near orthogonal. M is
    a matrix, phi is ``(x, x x^T)`` with learned coefficients (degree 2), the four gates are
    sigmoids of the token, and gradients are taken at the last border of mini-batches.

    Source: Behrouz et al. 2025, Atlas (arXiv:2505.23735), section 3 (feature map, Omega rule) and
    section 5 (Muon, chunks); Newton-Schulz: Jordan et al. 2024.
    """

    def __init__(self, d_model: int, config: AtlasConfig, linear: LinearFactory):
        super().__init__()
        self.config, self.batch, self.context = config, config.mini_batch, config.window - 1
        self.heads, self.head_dim = config.heads, d_model // config.heads
        K = self.head_dim
        self.features = K + K * K if config.degree == 2 else K
        self.qkv = linear(d_model, 3 * d_model, "qkv")
        self.gates = linear(d_model, 4 * config.heads, "gates")
        self.out = linear(d_model, d_model, "out")
        self.gate_bias = nn.Parameter(torch.empty(4, config.heads))  # alpha, eta, theta, gamma
        self.coefficients = nn.Parameter(torch.empty(2)) if config.degree == 2 else None
        self.norm_weight = nn.Parameter(torch.empty(config.heads, K))

    def init_weights(self) -> None:
        with torch.no_grad():
            # Slow forgetting, small steps, momentum of about 0.9, the window nearly even.
            self.gate_bias.copy_(torch.tensor([5.0, -2.0, 2.2, 2.0])[:, None].expand(4, self.heads))
            if self.coefficients is not None:
                self.coefficients.copy_(torch.tensor([1.0, 0.5]))  # of the exponential's series
        nn.init.ones_(self.norm_weight)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        B, T, _ = x_BTD.shape
        wide = torch.promote_types(self.gate_bias.dtype, torch.float32)
        q, k, v = self.qkv(x_BTD, ctx).to(wide).view(B, T, 3, self.heads, self.head_dim).unbind(2)
        q, k = (F.normalize(t, dim=-1, eps=EPS) for t in (q, k))
        raw = self.gates(x_BTD, ctx).to(wide).view(B, T, 4, self.heads)
        gates = (raw + self.gate_bias.to(wide)).sigmoid().transpose(2, 3)
        with torch.autocast(x_BTD.device.type, enabled=False):
            y, after = self.learn_documents((q, k, v, gates), ctx, state)
            y = F.layer_norm(y, y.shape[-1:], eps=EPS) * self.norm_weight.to(wide)
        return Out(self.out(y.flatten(2).to(x_BTD.dtype), ctx), after)

    def start(self) -> Tensors:
        wide = torch.promote_types(self.gate_bias.dtype, torch.float32)
        zero = self.gate_bias.new_zeros(self.heads, self.features, self.head_dim, dtype=wide)
        return (zero, zero) if self.config.momentum else (zero,)

    def feature_shapes(self) -> tuple[tuple[int, ...], ...]:
        one = (self.heads, self.head_dim)
        return (one, one, one, (self.heads, 4))

    def phi(self, x: Tensor) -> Tensor:
        """`(..., K)` to features `(..., F)`."""
        if self.coefficients is None:
            return x
        first, second = self.coefficients.to(x)
        return torch.cat((first * x, second * (x[..., :, None] * x[..., None, :]).flatten(-2)), -1)

    def learn(self, weights: Tensors, features: Tensors) -> tuple[Tensor, Tensors]:
        P, C = self.context, self.batch
        q, k, v, gates = (f.transpose(1, 2) for f in features)  # (R, H, P + C, .)
        M = weights[0]
        fq, fk = self.phi(q[..., P:, :]), self.phi(k)
        alpha, eta, theta = gates[..., P:, :3].unbind(-1)
        error = (fk @ M - v) * gates[..., 3:]
        # Token t of the mini-batch learns from t .. t + P of its features.
        t = torch.arange(C, device=q.device)
        behind = t[:, None] + P - torch.arange(P + C, device=q.device)
        window = ((behind >= 0) & (behind <= P)).to(M)
        if self.config.momentum:
            held, fade = decays(theta)
            S = torch.einsum("rhti,rhik,rhiv->rhtkv", fade @ window, fk, error)
            S = S + held[..., None, None] * weights[1][:, :, None]
        else:
            S = torch.einsum("ti,rhik,rhiv->rhtkv", window, fk, error)
        held, fade = decays(alpha)
        step = (fade * eta[..., None, :]) @ newton_schulz(S, self.config.steps).flatten(-2)
        memory = held[..., None, None] * M[:, :, None] - step.view_as(S)
        y = (fq[..., None, :] @ memory)[..., 0, :]
        last = (memory[:, :, -1], S[:, :, -1]) if self.config.momentum else (memory[:, :, -1],)
        return y.transpose(1, 2), last


def decays(gate_RHC: Tensor) -> tuple[Tensor, Tensor]:
    """Products of a gate up to each token, and from token to token `(R, H, C, C)`.

    The latter are 1 on the diagonal, 0 above it.
    """
    log = gate_RHC.clamp_min(torch.finfo(gate_RHC.dtype).tiny).log().cumsum(-1)
    future = torch.ones(log.shape[-1], log.shape[-1], dtype=torch.bool, device=log.device).triu(1)
    gap = (log[..., :, None] - log[..., None, :]).masked_fill(future, -torch.inf)
    return log.exp(), gap.exp()


def newton_schulz(S: Tensor, steps: int) -> Tensor:
    """Matrices `(..., F, V)` with singular values near 1; 0 steps leaves them as they are.

    Source: Jordan et al. 2024, Muon (quintic iteration).
    """
    if not steps:
        return S
    tall = S.shape[-2] > S.shape[-1]
    x = S.transpose(-1, -2) if tall else S
    # A zero matrix stays one, also in its gradient.
    x = x * (x.square().sum((-2, -1), keepdim=True) + EPS**2).rsqrt()
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


@MIXERS.register("atlas")
class AtlasConfig(EvenHeadsConfig):
    """Test-time memory fitted to a sliding window by a Muon step."""

    kind: Literal["atlas"] = "atlas"
    window: Annotated[int, Field(gt=0, description="tokens that a step fits")] = 8
    mini_batch: Annotated[int, Field(gt=0, description="tokens that share a border")] = 16
    degree: Annotated[Literal[1, 2], Field(description="of the keys' polynomial features")] = 1
    momentum: bool = True
    steps: Annotated[int, Field(ge=0, description="Newton-Schulz iterations; 0 = none")] = 5

    layer = Atlas
    small = {"heads": 2, "window": 3, "mini_batch": 2, "degree": 2}
