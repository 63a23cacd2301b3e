"""An adapter: continuous features to embeddings through two layers.

G items, L their length, C features, D model.

    mm train configs/quickstart/backbone.yaml "imports=[examples.adapter_mlp]" \
        "model.adapters={image: {kind: mlp, d_in: 768}}"
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


class MLPAdapter(Adapter):
    """``out(gelu(inner(features)))``: feature vector l of an item fills its l-th reserved place.

    Source: Liu et al. 2023, LLaVA-1.5 (arXiv:2310.03744), section 3.3.
    """

    def __init__(self, d_in: int, d_model: int):
        super().__init__()
        self.inner, self.out = nn.Linear(d_in, d_model), nn.Linear(d_model, d_model)

    def init_weights(self) -> None:
        for layer in (self.inner, self.out):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def zero_item(self, device: torch.device) -> Tensor:
        """`(1, 1, C)`: the item that a batch without this modality runs through the module."""
        return torch.zeros(1, 1, self.inner.in_features, device=device, dtype=self.out.weight.dtype)

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        hidden = nn.functional.gelu(self.inner(values.data.to(self.out.weight.dtype)))
        return AdapterOutput(self.out(hidden), None, values.length)


@ADAPTERS.register("mlp")
class MLPAdapterConfig(Config):
    """Two layers with a GELU between, from ``d_in`` features."""

    kind: Literal["mlp"] = "mlp"
    d_in: Annotated[int, Field(gt=0)] = 1

    def build(self, d_model: int) -> MLPAdapter:
        return MLPAdapter(self.d_in, d_model)

    @classmethod
    def smallest(cls) -> MLPAdapterConfig:
        return cls(d_in=3)
