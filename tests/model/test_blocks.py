"""Blocks against their formulas. B rows, T tokens, D model."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mm import config as yaml_config
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.backbones.stack import StackConfig
from mm.model.context import Ctx
from mm.model.layer import Block, init_weights, name_layers
from mm.registry import BLOCKS, FFNS, MIXERS

D, T = 8, 40
LAYOUT = Layout.from_rows([[Doc(2)] * 20, [Doc(3)] * 13], T)


def build(value: Any, ffn: bool = True) -> Block:
    torch.manual_seed(0)
    make = lambda registry, value: cast(Any, registry.parse(value))
    fed = make(FFNS, {"kind": "mlp", "hidden": 12}).build(D) if ffn else None
    mixer = make(MIXERS, {"kind": "attention", "heads": 2}).build(D)
    layer = make(BLOCKS, value).build(D, mixer, fed)
    init_weights(layer)
    return layer.double()


def apply(layer: Any, x: Tensor, seed: int = 0) -> Tensor:
    return layer(x, Ctx(LAYOUT, Causal(), seed=seed)).y


def inputs() -> Tensor:
    return torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ffn", [True, False])
def test_parallel_adds_both_branches_of_one_norm(ffn: bool) -> None:
    block, x = cast(Any, build("parallel", ffn)), inputs()
    read = block.norm(x)
    branches = [block.mixer, *([block.ffn] if ffn else [])]
    torch.testing.assert_close(apply(block, x), x + sum(apply(b, read) for b in branches))


def test_sandwich_norms_before_and_after_both_branches() -> None:
    block, x = cast(Any, build(yaml_config.read("block/sandwich"))), inputs()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y = x + block.mixer_post_norm(apply(block.mixer, block.mixer_norm(x)))
    y = y + block.ffn_post_norm(apply(block.ffn, block.ffn_norm(y)))
    torch.testing.assert_close(apply(block, x), y)


@pytest.mark.parametrize("inner", ["prenorm", "parallel"])
def test_layer_drop_is_off_outside_training_and_drops_whole_documents_in_it(inner: str) -> None:
    block, x = cast(Any, build({"kind": "layer_drop", "rate": 0.4, "block": inner})), inputs()
    whole = apply(block.block, x)
    assert torch.equal(apply(block.eval(), x), whole)
    y = apply(block.train(), x)
    documents, dropped = LAYOUT.fields.document, 0
    for number in range(1, 34):
        here = documents == number
        if torch.equal(y[here], x[here]):
            dropped += 1
        else:
            torch.testing.assert_close((y - x)[here] * 0.6, (whole - x)[here])
    assert 7 <= dropped <= 20, "about 13 of 33"
    assert torch.equal(y, apply(block, x)) and not torch.equal(y, apply(block, x, seed=1))


def test_layers_are_dropped_apart() -> None:
    block = {"kind": "layer_drop", "rate": 0.5}
    mixers = {"attention": {"heads": 2}}
    stack = StackConfig(depth=3, mixers=mixers, ffn=None, block=block).build(D)
    init_weights(stack)
    name_layers(stack)
    seen: list[Tensor] = []
    for layer in stack.double().train().layers:
        layer.register_forward_hook(lambda m, args, out: seen.append((out.y == args[0]).all(-1)))
    apply(stack, inputs())
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
