"""A layer of a config, away from its initial values."""

from __future__ import annotations

from typing import Any

import torch
from laws import D

from mm.model.layer import Layer, init_weights


def made(config: Any) -> Layer:
    """The layer, float64, every parameter away from its special value."""
    torch.manual_seed(3)
    layer = config.build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.double()
