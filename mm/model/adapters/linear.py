"""One projection of continuous features into the reserved places.

G items, L their length, C features, D model.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Values
from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Adapter, AdapterOutput
from mm.registry import ADAPTERS


class LinearAdapter(Adapter):
    """``data @ weight.T + bias``: feature vector l of an item fills its l-th reserved place."""

    keeps_length = True

    def __init__(self, d_in: int, d_model: int):
        super().__init__()
        self.d_in = d_in
        self.weight = nn.Parameter(torch.empty(d_model, d_in))
        self.bias = nn.Parameter(torch.empty(d_model))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def zero_item(self, device: torch.device) -> Tensor:
        """`(1, 1, C)`: the item that a batch without this modality runs through the module."""
        return torch.zeros(1, 1, self.d_in, device=device, dtype=self.weight.dtype)

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        x = nn.functional.linear(values.floats(self.weight.dtype), self.weight, self.bias)
        return AdapterOutput(x, None, values.length)


@ADAPTERS.register("linear")
class LinearAdapterConfig(Config):
    """A linear map of ``d_in`` features."""

    kind: Literal["linear"] = "linear"
    d_in: Annotated[int, Field(gt=0)] = 1

    def build(self, d_model: int) -> LinearAdapter:
        return LinearAdapter(self.d_in, d_model)

    small = {"d_in": 3}
