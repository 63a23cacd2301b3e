"""Gated recurrent unit.

R rows of one document, L their length, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mm.model.mixers.rnn.base import RNN, RNNConfig
from mm.registry import MIXERS


class GRU(RNN):
    """``h_t = (1 - z) * n + z * h_{t-1}``, ``n = tanh(W x + b + r * (U h_{t-1} + d))``. Sequential.

    ``r, z`` are sigmoid gates of both.

    Source: Cho et al. 2014 (arXiv:1406.1078), eq. 5-8, in the form that resets after the product,
    as `torch.nn.GRU` and cuDNN do (there z and 1 - z are swapped).
    """

    gates = 3
    parts = 1

    def outputs(self, x_RLD: Tensor, before_RS: Tensor) -> Tensor:
        first, train = before_RS[None], torch.is_grad_enabled()
        return torch.gru(x_RLD, first, self.weights(), True, 1, 0.0, train, False, True)[0]

    def states(self, x_RLD: Tensor, before_RS: Tensor) -> tuple[Tensor, Tensor]:
        y = self.outputs(x_RLD, before_RS)
        return y, y


@MIXERS.register("gru")
class GRUConfig(RNNConfig):
    """Gated recurrent unit, sequential in time."""

    kind: Literal["gru"] = "gru"

    layer = GRU
