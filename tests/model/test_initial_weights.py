"""The law `initial weights`: they follow from the seed and a module's name, whatever else is built.

Over whatever is registered.
"""

from __future__ import annotations

import pytest
import torch
from laws import VARIANTS, VOCABULARY, layers
from torch import Tensor, nn

from mm.model.layer import init_weights
from mm.registry import NETWORKS


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in [*module.named_parameters(), *module.named_buffers()]}


def filled(module: nn.Module, seed: int) -> nn.Module:
    init_weights(module, seed)
    return module


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@layers
def test_law_a_layer_has_the_weights_that_it_has_alone(name: str) -> None:
    alone = filled(nn.ModuleDict({"it": VARIANTS[name]()}), 3)
    others = {"first": nn.Linear(3, 5), "twin": VARIANTS[name](), "it": VARIANTS[name]()}
    torch.rand(7)
    among = filled(nn.ModuleDict(others), 3)
    have, twin = tensors(among["it"]), tensors(among["twin"])  # type: ignore[index]
    assert_same(tensors(alone["it"]), have)  # type: ignore[index]
    other = tensors(filled(nn.ModuleDict({"it": VARIANTS[name]()}), 4)["it"])  # type: ignore[index]
    drawn = [n for n, t in have.items() if not torch.equal(t, other[n])]
    assert all(not torch.equal(have[n], twin[n]) for n in drawn), "two layers are one"
    matrices = [n for n, t in have.items() if n.endswith("weight") and t.dim() > 1]
    assert drawn or not matrices, "another seed, the same weights"


def test_law_a_layer_more_moves_no_weight_of_the_others() -> None:
    config = NETWORKS.get("lm").smallest()

    def of_depth(n: int) -> dict[str, Tensor]:
        stack = config.backbone.model_copy(update={"depth": n, "pattern": "attention"})
        model = config.model_copy(update={"backbone": stack}).build(VOCABULARY)
        return tensors(filled(model, 5))

    some, more = of_depth(2), of_depth(3)
    scaled = (2 / 3) ** 0.5  # ends of residual branches
    assert more.keys() > some.keys()
    for name, t in some.items():
        ratio = 1.0 if torch.equal(t, more[name]) else scaled
        torch.testing.assert_close(more[name], t * ratio, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_law_a_network_is_the_same_each_time(kind: str) -> None:
    make = lambda: filled(NETWORKS.get(kind).smallest().build(VOCABULARY), 1)
    one = tensors(make())
    torch.rand(3)
    assert_same(one, tensors(make()))
