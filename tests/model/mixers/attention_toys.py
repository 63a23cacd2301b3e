"""An attention layer with random weights, and attention by its formula. H heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from laws import D
from torch import Tensor

from mm.model.layer import Layer, init_weights
from mm.registry import MIXERS


def build(kind: str, **settings: Any) -> Layer:
    torch.manual_seed(5)
    layer = MIXERS.get(kind)(**{"heads": 2, "position": "none", **settings}).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer.double()


def heads(x: Tensor, *counts: int) -> list[Tensor]:
    """`(T, sum of counts * K)` to a `(count, T, K)` each."""
    return list(x.unflatten(-1, (sum(counts), -1)).transpose(0, 1).split(counts))


def causal_softmax(logits: Tensor) -> Tensor:
    T = logits.shape[-1]
    return logits.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)


def merged(o: Tensor) -> Tensor:
    return o.transpose(0, 1).flatten(1)
