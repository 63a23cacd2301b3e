"""The law `initial weights`: they follow from the seed and a module's name, whatever else is built.

Over whatever is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import VARIANTS, VOCABULARY, layers
from torch import Tensor, nn

from mm.model.by_module import build_empty, fill_by_module
from mm.model.layer import init_weights
from mm.registry import ADAPTERS, BACKBONES, EMBEDDERS, HEADS, LINEARS, NETWORKS


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
    config: Any = NETWORKS.get("lm").smallest()

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


def assert_same_by_module(make: Callable[[], nn.Module]) -> None:
    whole = filled(make(), 2)
    network = build_empty(make, torch.device("cpu"))
    assert all(p.is_meta for p in network.parameters())
    before = [id(p) for p in network.parameters()]
    kept: dict[str, Tensor] = {}
    for _, found in fill_by_module(network, torch.device("cpu"), 2):
        for name, p in found.items():
            assert name not in kept
            kept[name] = p.detach().clone()
            p.data = p.new_empty(0)  # as ZeRO stage 3 leaves it
    assert before == [id(p) for p in network.parameters()]
    assert_same(kept, {n: p.detach() for n, p in whole.named_parameters()})
    assert_same(*(dict(m.named_buffers()) for m in (network, whole)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_law_a_network_filled_by_module_is_the_whole_one(kind: str) -> None:
    assert_same_by_module(lambda: NETWORKS.get(kind).smallest().build(VOCABULARY))


def test_law_plugs_filled_by_module_are_those_of_a_whole_network() -> None:
    """Every backbone, embedder, linear, head and adapter; tied, scaled by width."""
    lm = NETWORKS.get("lm")

    def of(**keys: Any) -> Callable[[], nn.Module]:
        return lambda: lm.smallest().model_copy(update=keys).build(VOCABULARY)

    small = lambda registry, kind: registry.get(kind).smallest()
    kinds = ((BACKBONES, "backbone"), (EMBEDDERS, "embedder"), (LINEARS, "linear"))
    for registry, field in kinds:
        for kind in registry:
            assert_same_by_module(of(**{field: small(registry, kind)}))
    on_nf4 = LINEARS.parse({"kind": "lora", "base_layer": "nf4", "dora": True})
    assert_same_by_module(of(linear=on_nf4))  # its matrices are buffers
    for kind in HEADS:
        assert_same_by_module(of(heads={"tokens": small(HEADS, kind)}, mup_base=4))
    tied = HEADS.get("softmax").smallest().model_copy(update={"tied": True})
    assert_same_by_module(of(heads={"tokens": tied}, mup_base=4))
    for kind in ADAPTERS:
        assert_same_by_module(of(adapters={"image": small(ADAPTERS, kind)}))


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith(("mixer", "ffn", "linear"))])
def test_law_a_layer_in_a_stack_is_filled_as_in_a_whole_one(name: str) -> None:
    def make() -> nn.Module:
        stack = BACKBONES.get("stack").smallest().build(16)
        return nn.ModuleDict({"stack": stack, "layer": VARIANTS[name]()})

    assert_same_by_module(make)
