"""Features that another model made, as they are stored in shards, into the reserved places.

G items, L their length, C features, D model, H hidden.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Values
from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Adapter, AdapterOutput
from mm.model.norm import LayerNorm
from mm.registry import ADAPTERS


class ProjectAdapter(Adapter):
    """``W_2 gelu(W_1 norm(features) + b_1) + b_2``: vector l of an item fills its l-th place.

    Source: a linear map of a frozen encoder's features: Liu et al. 2023, LLaVA (arXiv:2304.08485),
    eq. 1; two layers with a GELU between: LLaVA-1.5 (arXiv:2310.03744), section 3; behind a
    LayerNorm: InternVL 1.5 (arXiv:2404.16821), as in its code.
    """

    keeps_length = True

    def __init__(self, d_model: int, config: ProjectConfig):
        super().__init__()
        self.d_in = config.d_in
        widths = [config.d_in, *[config.hidden or d_model] * (config.layers - 1), d_model]
        self.norm = LayerNorm(config.d_in) if config.norm else None
        pairs = zip(widths, widths[1:], strict=False)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)

    def init_weights(self) -> None:
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def zero_item(self, device: torch.device) -> Tensor:
        """`(1, 1, C)`: the item that a batch without this modality runs through the module."""
        like = next(self.parameters())
        return torch.zeros(1, 1, self.d_in, device=device, dtype=like.dtype)

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        x = values.floats(next(self.parameters()).dtype)
        x = x if self.norm is None else self.norm(x)
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else F.gelu(x))
        return AdapterOutput(x, None, values.length)


@ADAPTERS.register("project")
class ProjectConfig(Config):
    """Layers with a GELU between, from ``d_in`` features of another model."""

    kind: Literal["project"] = "project"
    d_in: Annotated[int, Field(gt=0)] = 1
    layers: Annotated[int, Field(gt=0, le=8, description="1: a linear map")] = 2
    hidden: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    norm: Annotated[bool, Field(description="LayerNorm of the features first")] = True

    small = {"d_in": 3, "hidden": 6}

    def build(self, d_model: int) -> ProjectAdapter:
        return ProjectAdapter(d_model, self)
