"""Mel frames through convolutions over time, one vector for every few of them.

G items, L places of `stack` frames, M mels, W width, D model.
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


class MelAdapter(Adapter):
    """``out(gelu(conv(gelu(conv(frames)))))``, the second convolution with the stride of a place.

    Frames past the end of a recording are zeros before each convolution, so that it is read as it
    would be alone. Source: Radford et al. 2022 (arXiv:2212.04356), section 2.2.
    """

    keeps_length = True

    def __init__(self, n_mels: int, stack: int, width: int, d_model: int):
        super().__init__()
        self.n_mels, self.stack = n_mels, stack
        self.first = nn.Conv1d(n_mels, width, 3, 1, 1)
        self.second = nn.Conv1d(width, width, stack + 2, stack, 1)
        self.out = nn.Linear(width, d_model)

    def init_weights(self) -> None:
        for layer in (self.first, self.second, self.out):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def zero_item(self, device: torch.device) -> Tensor:
        """`(1, 1, stack * M)`: the item that a batch without sound runs through the module."""
        size = self.n_mels * self.stack
        return torch.zeros(1, 1, size, device=device, dtype=self.out.weight.dtype)

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        x = values.floats(self.out.weight.dtype)
        G, L = x.shape[:2]
        frames = x.view(G, L * self.stack, self.n_mels).transpose(1, 2)
        at = torch.arange(L * self.stack, device=x.device)
        inside = (at < values.length[:, None] * self.stack)[:, None].to(x.dtype)
        y = nn.functional.gelu(self.first(frames * inside)) * inside
        y = nn.functional.gelu(self.second(y))
        return AdapterOutput(self.out(y.transpose(1, 2)), None, values.length)


@ADAPTERS.register("mel")
class MelAdapterConfig(Config):
    """Convolutions over frames that a tokenizer `mel_frames` made."""

    kind: Literal["mel"] = "mel"
    n_mels: Annotated[int, Field(gt=0, le=1024, description="as of the tokenizer")] = 80
    stack: Annotated[int, Field(gt=0, le=64, description="as of the tokenizer")] = 4
    width: Annotated[int, Field(gt=0, le=2**16, description="channels")] = 128

    @property
    def d_in(self) -> int:
        return self.n_mels * self.stack

    def build(self, d_model: int) -> MelAdapter:
        return MelAdapter(self.n_mels, self.stack, self.width, d_model)

    small = {"n_mels": 3, "stack": 2, "width": 4}
