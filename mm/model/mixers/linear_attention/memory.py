"""The State of mixers whose memory is a matrix a head. H heads, K key width, V value width, N
slots, L length of a call, C its conv size, W width of what is convolved, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm.kernels.linear_attention import linear_attention
from mm.state import DataclassState


@dataclass(frozen=True)
class Matrix(DataclassState):
    """The matrix that each head has summed up, and the convolution's last inputs."""

    S: Tensor  # (N, H, K, V) float32 or wider
    tail: Tensor  # (N, C - 1, W)

    def accept(self, n_N: Tensor) -> Matrix:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> Matrix:
        return self


@dataclass(frozen=True)
class DraftMatrix(DataclassState):
    """The matrix before a draft call, and what the call adds: accepting replays a prefix of it."""

    S: Tensor  # (N, H, K, V)
    k: Tensor  # (N, L, H, K)
    v: Tensor  # (N, L, H, V)
    g: Tensor | None  # (N, L, H) or (N, L, H, K)
    inputs: Tensor  # (N, C - 1 + L, W) the old tail, then the call's convolution inputs
    length: Tensor  # (N,)

    def accept(self, n_N: Tensor) -> Matrix:
        n = torch.minimum(n_N.to(self.length), self.length)
        L = self.k.shape[1]
        k, v, g = kept(torch.arange(L, device=n.device) < n[:, None], self.k, self.v, self.g)
        assert k is not None and v is not None
        _, S = linear_attention(torch.zeros_like(k), k, v, g, self.S)
        return Matrix(S, tail_of(self.inputs, self.inputs.shape[1] - L, n))

    def commit(self) -> Matrix:
        return self.accept(self.length)


def kept(valid_RL: Tensor, *x: Tensor | None) -> list[Tensor | None]:
    """Zeros at places that do not count: without key, value and decay they leave a state alone."""
    return [
        t.masked_fill(~valid_RL.view(*valid_RL.shape, *[1] * (t.dim() - 2)), 0)
        if t is not None
        else None
        for t in x
    ]


def tail_of(inputs: Tensor, size: int, n_N: Tensor) -> Tensor:
    """The ``size`` inputs before place ``n`` of each row. ``inputs`` `(N, size + L, W)`."""
    places = n_N[:, None] + torch.arange(size, device=n_N.device)
    return inputs.gather(1, places[..., None].expand(-1, -1, inputs.shape[-1]))
