"""The adapter `project`: features that another model made, as they are stored."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.batch import Values
from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.registry import ADAPTERS, TOKENIZERS

D, C = 5, 3


def apply(settings: dict[str, Any], x: Tensor) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    config = cast(Any, ADAPTERS.parse({"kind": "project", "d_in": C, **settings}))
    adapter = config.build(D).double()
    init_weights(adapter)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    out = adapter(Values.items(x), Ctx(Layout.plain(1, 1), Causal()))
    return adapter, out.x


@pytest.mark.parametrize("norm", [True, False])
def test_two_layers_are_the_formula(norm: bool) -> None:
    x = torch.randn(2, 4, C, dtype=torch.float64)
    adapter, y = apply({"norm": norm, "hidden": 7}, x)
    if norm:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        x = x * adapter.norm.weight + adapter.norm.bias
    first, second = adapter.layers
    hidden = x @ first.weight.T + first.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    torch.testing.assert_close(y, hidden @ second.weight.T + second.bias)
    assert first.weight.shape == (7, C)


def test_one_layer_is_a_linear_map_and_three_have_two_activations() -> None:
    x = torch.randn(1, 2, C, dtype=torch.float64)
    adapter, y = apply({"norm": False, "layers": 1}, x)
    torch.testing.assert_close(y, x @ adapter.layers[0].weight.T + adapter.layers[0].bias)
    adapter, y = apply({"norm": False, "layers": 3}, x)
    assert [m.weight.shape for m in adapter.layers] == [(D, C), (D, D), (D, D)]
    gelu = torch.nn.functional.gelu
    a, b, c = adapter.layers
    torch.testing.assert_close(y, c(gelu(b(gelu(a(x))))))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "series_patches", "patch": 1, "channels": C, "norm_points": 0},
        {"kind": "array_patches", "patch": [1], "channels": C, "normalise": "none"},
    ],
)
def test_features_are_stored_as_they_are(settings: dict[str, Any]) -> None:
    features = np.random.default_rng(0).normal(3, 50, (6, C)).astype(np.float32)
    tokenizer = cast(Any, TOKENIZERS.parse(settings)).build()
    (code,) = tokenizer.encode([features])
    assert np.array_equal(code.values, features)
    (back,) = tokenizer.decode([code])
    assert np.array_equal(getattr(back, "values", back), features)
