"""Patch critic: a small fully convolutional network that says of every patch whether it is real.

G items, C colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mm.batch import Batch
from mm.config import Config
from mm.model.layer import ModelOut
from mm.registry import NETWORKS
from mm.tokenizers.image.vq import colours

NONE: Mapping[str, Any] = {}


class PatchCritic(nn.Module):
    """Strided convolutions to a map of scores, one a patch.

    Source: Isola et al. 2017, arXiv:1611.07004, section 3.2.2, without batch norm: it would tie the
    items of a micro-batch together.
    """

    def __init__(self, config: PatchCriticConfig):
        super().__init__()
        self.config = config
        layers, c = [], config.channels
        for i in range(config.depth):
            width = config.width * 2 ** min(i, 3)
            layers.append(nn.Conv2d(c, width, 4, stride=2, padding=1))
            c = width
        self.layers = nn.ModuleList(layers)
        self.score = nn.Conv2d(c, 1, 3, padding=1)

    def init_weights(self) -> None:
        """Fill the convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.in_channels * math.prod(module.kernel_size)
                nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, batch: Batch, **_: Any) -> ModelOut:
        """Judge ``batch.values["image"]``, data ``(G, 1 or 3, H, W)`` in [0, 1].

        Returns:
            intermediates: "score.0" (G, 1, h, w); "feature.0.<i>" (G, D, h, w) of every hidden
            layer.
        """
        x: Tensor = 2 * colours(batch.values[self.config.modality].data, self.config.channels) - 1
        intermediates: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x = F.leaky_relu(layer(x), 0.2)
            intermediates[f"feature.0.{i}"] = x
        intermediates["score.0"] = self.score(x)
        return ModelOut(x, {}, None, intermediates, {})


@NETWORKS.register("patch_critic")
class PatchCriticConfig(Config):
    """PatchGAN critic; its receptive field grows with ``depth``."""

    kind: Literal["patch_critic"] = "patch_critic"
    modality: str = "image"
    channels: Annotated[Literal[1, 3], Field(description="1: gray, 3: RGB")] = 3
    width: Annotated[
        int, Field(gt=0, description="channels of the first layer; doubled up to 8 times")
    ] = 32
    depth: Annotated[int, Field(ge=1, description="strided layers")] = 3

    def build(self, vocabulary: Any = None) -> PatchCritic:
        """Allocate the network; `mm.model.layer.init_weights` fills it."""
        return PatchCritic(self)

    @classmethod
    def smallest(cls) -> PatchCriticConfig:
        return cls(width=8, depth=2)
