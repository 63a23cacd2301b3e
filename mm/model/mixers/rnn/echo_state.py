"""Residual echo state network.

R rows of one document, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.model.layer import LinearFactory
from mm.model.layer_config import LayerConfig
from mm.model.mixers.rnn.base import Cell
from mm.registry import MIXERS


class EchoState(Cell):
    """``h_t = alpha O h_{t-1} + beta tanh(W_h h_{t-1} + W_x x_t + b)``. Sequential.

    Only ``out`` is trained.

    Source: Pinna et al. 2025, DeepResESN (arXiv:2508.21172); stacking layers is the
    backbone's. The readout is a matrix that is trained like any other here, not a ridge regression.
    """

    orthogonal: Tensor
    recurrent: Tensor
    inner: Tensor
    bias: Tensor

    def __init__(self, d_model: int, config: EchoStateConfig, linear: LinearFactory):
        W = config.width or d_model
        super().__init__(W, W)
        self.config = config
        self.register_buffer("orthogonal", torch.empty(W, W))
        self.register_buffer("recurrent", torch.empty(W, W))
        self.register_buffer("inner", torch.empty(W, d_model))
        self.register_buffer("bias", torch.empty(W))
        self.out = linear(W, d_model, "out")

    def init_weights(self) -> None:
        c, W = self.config, self.width
        nn.init.uniform_(self.inner, -c.input_scale, c.input_scale)
        nn.init.uniform_(self.bias, -c.bias_scale, c.bias_scale)
        eye = torch.eye(W)
        turn = {
            "random": lambda: nn.init.orthogonal_(torch.empty(W, W)),
            "cyclic": lambda: eye.roll(1, 0),
            "identity": lambda: eye,
        }
        self.orthogonal.copy_(turn[c.residual]())
        random = torch.empty(W, W).uniform_(-1, 1)
        largest = torch.linalg.eigvals(random.double()).abs().max().clamp_min(1e-12)
        self.recurrent.copy_(random * (c.spectral_radius / float(largest)))

    def inputs(self, x_RLD: Tensor) -> Sequence[Tensor]:
        x = x_RLD.to(self.memory.dtype)
        return (F.linear(x, self.inner.to(x), self.bias.to(x)),)

    def step(self, read: Sequence[Tensor], before_RS: Tensor) -> Tensor:
        c, h = self.config, before_RS
        moved = (read[0] + F.linear(h, self.recurrent.to(h))).tanh()
        return c.alpha * F.linear(h, self.orthogonal.to(h)) + c.beta * moved


@MIXERS.register("echo_state")
class EchoStateConfig(LayerConfig):
    """Untrained residual reservoir with a trained readout, sequential in time."""

    kind: Literal["echo_state"] = "echo_state"
    width: Annotated[int, Field(gt=0, description="units; default d_model")] | None = None
    residual: Literal["random", "cyclic", "identity"] = "random"
    alpha: Annotated[float, Field(ge=0, le=1, description="of the residual branch")] = 0.9
    beta: Annotated[float, Field(gt=0, le=1, description="of the non-linear branch")] = 0.1
    spectral_radius: Annotated[float, Field(gt=0)] = 0.9
    input_scale: Annotated[float, Field(gt=0)] = 1.0
    bias_scale: Annotated[float, Field(ge=0)] = 0.1

    layer = EchoState
    small = {"width": 6}
