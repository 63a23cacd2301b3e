"""A few memory slots that learn what is new to them.

B rows, T tokens, D model, H heads, M slots, K slot width, R rows of one document, C tokens of a
mini-batch.
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
from mm.model.mixers.test_time.atlas import decays
from mm.model.mixers.test_time.base import Learner, Tensors
from mm.registry import MIXERS
from mm.state import State

EPS = 1e-6


class Lattice(Learner):
    """``s_i <- alpha s_i + eta k_i (I - u_i u_i^T) e / |s_i|``, ``u_i = s_i / |s_i|``.

    One gradient step a token on slots that are normalised, so each takes up only what is orthogonal
    to it; read ``sum_i q_i u_i``. ``e = v - sum_j k_j u_j`` for the loss ``|sum_j k_j u_j - v|^2 /
    2`` (regression), ``e = v`` for ``- v . sum_j k_j u_j`` (similarity). k and q are codes over the
    slots, of length 1. Gradients are taken at the last border of mini-batches; with mini-batches of
    1 it is the recurrence.

    Source: Karami et al. 2025, Lattice (arXiv:2504.05646), the orthogonal update and its chunk-wise
    form; a learned start and the normalisation of codes are choices of this file.
    """

    def __init__(self, d_model: int, config: LatticeConfig, linear: LinearFactory):
        super().__init__()
        self.config, self.batch = config, config.mini_batch
        self.heads, self.head_dim = config.heads, d_model // config.heads
        H, M, K = self.heads, config.slots, self.head_dim
        self.codes = linear(d_model, 2 * H * M, "codes")
        self.value = linear(d_model, H * K, "value")
        self.gates = linear(d_model, 2 * H, "gates")
        self.gate_bias = nn.Parameter(torch.empty(2, H))  # alpha, eta
        self.slots = nn.Parameter(torch.empty(H, M, K))
        self.out = linear(H * K, d_model, "out")

    def init_weights(self) -> None:
        nn.init.normal_(self.slots, std=self.head_dim**-0.5)
        with torch.no_grad():
            self.gate_bias.copy_(torch.tensor([5.0, 0.0])[:, None].expand_as(self.gate_bias))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        B, T, _ = x_BTD.shape
        wide = torch.promote_types(self.slots.dtype, torch.float32)
        codes = self.codes(x_BTD, ctx).to(wide).view(B, T, 2, self.heads, self.config.slots)
        q, k = F.normalize(codes, dim=-1, eps=EPS).unbind(2)
        v = self.value(x_BTD, ctx).to(wide).view(B, T, self.heads, self.head_dim)
        raw = self.gates(x_BTD, ctx).to(wide).view(B, T, 2, self.heads)
        gates = (raw + self.gate_bias.to(wide)).sigmoid().transpose(2, 3)
        with torch.autocast(x_BTD.device.type, enabled=False):
            y, after = self.learn_documents((q, k, v, gates), ctx, state)
        return Out(self.out(y.flatten(2).to(x_BTD.dtype), ctx), after)

    def start(self) -> Tensors:
        return (self.slots.to(torch.promote_types(self.slots.dtype, torch.float32)),)

    def feature_shapes(self) -> tuple[tuple[int, ...], ...]:
        code = (self.heads, self.config.slots)
        return (code, code, (self.heads, self.head_dim), (self.heads, 2))

    def learn(self, weights: Tensors, features: Tensors) -> tuple[Tensor, Tensors]:
        q, k, v, gates = (f.transpose(1, 2) for f in features)  # (R, H, C, .)
        (slots,) = weights  # (R, H, M, K)
        length = _length(slots)
        unit = slots / length
        error = v - k @ unit if self.config.objective == "regression" else v
        alpha, eta = gates.unbind(-1)
        held, fade = decays(alpha)
        # What token t writes into slot i, before its part along the slot is taken out.
        share = eta[..., None] * k / length.mT  # (R, H, C, M)
        added = torch.einsum("rhct,rhtm,rhtk->rhcmk", fade, share, error)
        along = torch.einsum("rhcmk,rhmk->rhcm", added, unit)
        added = added - along[..., None] * unit[:, :, None]
        passed = held[..., None, None] * slots[:, :, None] + added  # (R, H, C, M, K)
        y = torch.einsum("rhcm,rhcmk->rhck", q, passed / _length(passed))
        return y.transpose(1, 2), (passed[:, :, -1],)


def _length(x: Tensor) -> Tensor:
    """Of vectors `(..., K)`, as `(..., 1)`; never zero."""
    return (x.square().sum(-1, keepdim=True) + EPS**2).sqrt()


@MIXERS.register("lattice")
class LatticeConfig(EvenHeadsConfig):
    """Memory slots updated orthogonally to themselves."""

    kind: Literal["lattice"] = "lattice"
    slots: Annotated[int, Field(gt=0, description="of each head")] = 32
    objective: Literal["regression", "similarity"] = "regression"
    mini_batch: Annotated[int, Field(gt=0, description="tokens that share a border")] = 16

    layer = Lattice
    small = {"heads": 2, "slots": 3, "mini_batch": 2}
