"""Feed-forward layers against their formulas. B rows, T tokens, D model, F hidden."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import FeedForward, init_weights
from mm.registry import FFNS

D, HIDDEN = 8, 12


def build(kind: str, **values: Any) -> FeedForward:
    torch.manual_seed(0)
    layer = cast(Any, FFNS.parse({"kind": kind, **values})).build(D)
    init_weights(layer)
    return layer


def output(layer: FeedForward, x: Tensor) -> Tensor:
    return layer(x, Ctx(Layout.plain(*x.shape[:2]), Causal())).y


@pytest.mark.parametrize("gated", [False, True])
def test_sub_norm_norms_what_the_last_matrix_reads(gated: bool) -> None:
    layer = cast(Any, build("sub_norm", hidden=HIDDEN, gated=gated, activation="gelu"))
    x = torch.randn(2, 5, D)
    with torch.no_grad():
        layer.norm.weight.add_(0.2 * torch.randn(HIDDEN))
        layer.norm.bias.add_(0.2 * torch.randn(HIDDEN))
    if gated:
        gate, up = (x @ layer.gate_up.weight.T).chunk(2, -1)
        h = F.gelu(gate) * up
    else:
        h = F.gelu(x @ layer.up.weight.T)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    y = (h * layer.norm.weight + layer.norm.bias) @ layer.out.weight.T
    torch.testing.assert_close(output(layer, x), y)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_a_gated_mlp_is_swiglu_bit_for_bit(activation: str, hidden: int | None) -> None:
    """Names, shapes, outputs and gradients, from the same weights."""
    settings = {"activation": activation, "hidden": hidden}
    mlp, swiglu = build("mlp", gated=True, **settings), build("swiglu", **settings)
    mine, theirs = mlp.state_dict(), swiglu.state_dict()
    assert [*mine] == [*theirs] and all(torch.equal(mine[k], theirs[k]) for k in mine)
    x, weight = torch.randn(2, 5, D), torch.randn(2, 5, D)
    results = []
    for layer in (mlp, swiglu):
        given = x.clone().requires_grad_()
        y = output(layer, given)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [given, *layer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: x.clamp_min(0),
    "relu_squared": lambda x: x.clamp_min(0) ** 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", FORMULAS)
def test_an_mlp_is_its_formula(activation: str, gated: bool) -> None:
    layer = cast(Any, build("mlp", activation=activation, gated=gated, hidden=HIDDEN).double())
    x = torch.randn(2, 5, D, dtype=torch.float64)
    if gated:
        gate, up = layer.gate_up.weight.split(HIDDEN)
        hidden = FORMULAS[activation](x @ gate.T) * (x @ up.T)
    else:
        hidden = FORMULAS[activation](x @ layer.up.weight.T)
    torch.testing.assert_close(output(layer, x), hidden @ layer.out.weight.T)
