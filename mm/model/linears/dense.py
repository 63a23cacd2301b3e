"""The plain matrix."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Linear, LinearFactory
from mm.registry import LINEARS


class Dense(Linear):
    """``x @ weight.T``, normally initialised with standard deviation ``d_in ** -0.5``."""

    def __init__(self, d_in: int, d_out: int, name: str = "", bias: bool = False):
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def rescale(self, factor: float) -> None:
        with torch.no_grad():
            self.weight.mul_(factor)

    def forward(self, x: Tensor, ctx: Ctx | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@LINEARS.register("dense")
class DenseConfig(Config):
    """A matrix without bias, or with one: everywhere, or in the layers that a list names."""

    kind: Literal["dense"] = "dense"
    bias: bool | list[str] = Field(
        default=False, description="a list: names of the matrices that have one, such as [qkv]"
    )

    def build(self, d_in: int, d_out: int, name: str = "") -> Dense:
        bias = self.bias if isinstance(self.bias, bool) else name in self.bias
        return Dense(d_in, d_out, name, bias)


dense: LinearFactory = DenseConfig().build  # what a layer is built of where nothing else is said
