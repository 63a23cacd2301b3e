"""Unitary recurrent network.

R rows of one document, L their length, H heads, K their width, C positions of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.model.layer import LinearFactory
from mm.model.layer_config import LayerConfig
from mm.model.mixers.rnn.base import Recurrence
from mm.registry import MIXERS


class Unitary(Recurrence):
    """``s_t = Q(x_t) s_{t-1}`` in each head, with a rotation Q that the token chooses.

    ``Q = expm(A - A^T)``, ``s_0`` the first unit vector; no non-linearity, so nothing is ever
    forgotten.

    Products of rotations are associative: chunks of about sqrt(L) positions run beside one another.
    The State holds ``s - s_0``, so that a fresh slot is zeros.

    Source: Bernardy & Lappin 2022 (arXiv:2208.05719), the unitary-evolution recurrent
    network; heads are blocks of the paper's one rotation.
    """

    caps = replace(Recurrence.caps, sequential=False)

    def __init__(self, d_model: int, config: UnitaryConfig, linear: LinearFactory):
        heads, head_dim = config.heads, config.head_dim
        super().__init__(heads * head_dim, heads * head_dim)
        self.heads, self.head_dim = heads, head_dim
        self.angles = linear(d_model, heads * head_dim * (head_dim - 1) // 2, "angles")
        self.out = linear(self.width, d_model, "out")

    def rotations(self, x_RLD: Tensor) -> Tensor:
        """`(R, L, H, K, K)` orthogonal matrices with determinant 1."""
        K = self.head_dim
        above = torch.triu_indices(K, K, 1, device=x_RLD.device)
        number = torch.zeros(K, K, dtype=torch.long, device=x_RLD.device)
        number[above[0], above[1]] = torch.arange(above.shape[1], device=x_RLD.device)
        angles = self.angles(x_RLD).to(self.memory.dtype).unflatten(-1, (self.heads, -1))
        upper = angles[..., number] * torch.ones_like(angles[0, 0, 0, 0]).expand(K, K).triu(1)
        return torch.matrix_exp(upper - upper.transpose(-1, -2))

    def states(self, x_RLD: Tensor, before_RS: Tensor) -> tuple[Tensor, Tensor]:
        R, L = x_RLD.shape[:2]
        H, K = self.heads, self.head_dim
        zero = F.one_hot(torch.zeros(H, dtype=torch.long, device=x_RLD.device), K).to(before_RS)
        s = before_RS.view(R, H, K, 1) + zero[..., None]
        C = math.isqrt(L - 1) + 1
        Q = self.rotations(x_RLD)
        n = -(-L // C)
        if n * C > L:
            eye = torch.eye(K, device=Q.device, dtype=Q.dtype).expand(R, n * C - L, H, K, K)
            Q = torch.cat((Q, eye), 1)
        products, product = [], None
        for q in Q.view(R, n, C, H, K, K).unbind(2):
            product = q if product is None else q @ product
            products.append(product)
        starts = []
        for last in products[-1].unbind(1):
            starts.append(s)
            s = last @ s
        states = torch.stack(products, 2) @ torch.stack(starts, 1)[:, :, None]
        h = states.view(R, n * C, H, K)[:, :L]
        return h.flatten(2), (h - zero).flatten(2)


@MIXERS.register("unitary")
class UnitaryConfig(LayerConfig):
    """Rotations chosen by the tokens, without any non-linearity."""

    kind: Literal["unitary"] = "unitary"
    heads: Annotated[int, Field(gt=0)] = 4
    head_dim: Annotated[int, Field(gt=1)] = 8

    layer = Unitary
    small = {"heads": 2, "head_dim": 3}
