"""One projection of continuous features into the reserved places.

G items, L their length, C features, D model.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.batch import Values
from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Adapter, AdapterOutput
from mm.registry import ADAPTERS


class LinearAdapter(Adapter):
    """``data @ weight.T + bias``: feature vector l of an item fills its l-th reserved place."""

    keeps_length = True

    def __init__(
        self,
        d_in: int,
        d_model: int,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        self.d_in, self.mean, self.std = d_in, mean, std
        self.weight = nn.Parameter(torch.empty(d_model, d_in))
        self.bias = nn.Parameter(torch.empty(d_model))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def zero_item(self, device: torch.device) -> Tensor:
        """`(1, 1, C)`: the item that a batch without this modality runs through the module."""
        return torch.zeros(1, 1, self.d_in, device=device, dtype=self.weight.dtype)

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        x = values.floats(self.weight.dtype)
        if self.mean is not None and self.std is not None:
            shift, scale = channels(self.mean, self.std, self.d_in, x.dtype, x.device)
            x = x * scale + shift
        return AdapterOutput(nn.functional.linear(x, self.weight, self.bias), None, values.length)


@functools.lru_cache(maxsize=32)
def channels(
    mean: tuple[float, ...], std: tuple[float, ...], d_in: int, dtype: torch.dtype, device: Any
) -> tuple[Tensor, Tensor]:
    """What makes ``((x + 1) / 2 - mean) / std`` of ``x`` in [-1, 1]: shift and scale, (C,) each.

    A cached constant: no buffer to initialise, save or shard.
    """
    wide = torch.tensor((mean, std), dtype=torch.float64).tile(1, d_in // len(mean))
    shift, scale = (0.5 - wide[0]) / wide[1], 0.5 / wide[1]
    return shift.to(device, dtype), scale.to(device, dtype)


@ADAPTERS.register("linear")
class LinearAdapterConfig(Config):
    """A linear map of ``d_in`` features."""

    kind: Literal["linear"] = "linear"
    d_in: Annotated[int, Field(gt=0)] = 1
    mean: tuple[float, ...] | None = Field(
        default=None, description="of each channel of pixels from 0 to 1, which is subtracted"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None, description="of each channel, by which is divided then"
    )

    @model_validator(mode="after")
    def _channels_fit(self) -> LinearAdapterConfig:
        n = [0 if given is None else len(given) for given in (self.mean, self.std)]
        if n[0] != n[1] or (n[0] and self.d_in % n[0]):
            raise ValueError(f"mean and std: as many of each, a divisor of d_in {self.d_in}")
        return self

    def build(self, d_model: int) -> LinearAdapter:
        return LinearAdapter(self.d_in, d_model, self.mean, self.std)

    small = {"d_in": 3}
