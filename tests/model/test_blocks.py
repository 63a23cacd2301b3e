"""Blocks against their formulas. B rows, T tokens, D model."""

from __future__ import annotations

from dataclasses import replace
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


def test_norms_that_learn_nothing_and_bounded_projections() -> None:
    """OLMo's block: by hand, with queries, keys and values that the bound cuts."""
    mixer = cast(Any, MIXERS.parse({"kind": "attention", "heads": 2, "clip": 0.3})).build(D)
    fed = cast(Any, FFNS.parse({"kind": "mlp", "hidden": 12})).build(D)
    block = cast(Any, BLOCKS.parse({"kind": "prenorm", "norm": "nonparametric"})).build(
        D, mixer, fed
    )
    init_weights(block)
    block, x = block.double(), 5 + 3 * inputs()
    assert not [name for name, _ in block.named_parameters() if "_norm" in name.split(".")[0]]
    plain = lambda x: torch.nn.functional.layer_norm(x, (D,), eps=block.mixer_norm.eps)
    y = x + apply(mixer, plain(x))
    torch.testing.assert_close(apply(block, x), y + apply(fed, plain(y)))
    table = mixer.qkv(plain(x))
    assert (table.abs() > 0.3).any()
    free = cast(Any, MIXERS.parse({"kind": "attention", "heads": 2})).build(D).double()
    free.load_state_dict(mixer.state_dict())
    assert not torch.allclose(apply(free, plain(x)), apply(mixer, plain(x)))
    free.qkv.forward = lambda x, ctx=None: mixer.qkv(x).clamp(-0.3, 0.3)
    torch.testing.assert_close(apply(free, plain(x)), apply(mixer, plain(x)))


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


def hyper(n: int, **settings: Any) -> list[Any]:
    """Two blocks with every parameter away from its start."""
    blocks = [cast(Any, build({"kind": "hyper", "streams": n, **settings})) for _ in range(2)]
    with torch.no_grad():
        for p in (p for block in blocks for p in block.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    return blocks


def connected(part: Any, h: list[Tensor], place: int, layer: Any) -> list[Tensor]:
    """Equations of arXiv:2409.19606 stream by stream: A_m, A_r and B as static plus dynamic."""
    n, seen = len(h), [part.norm(x) for x in h]
    dot = lambda x, w: (x * w).sum(-1, keepdim=True).tanh()
    alpha = lambda i, j: (  # what stream i gives: j = 0 to the layer, else to stream j - 1
        (part.read[i] + (place % n == i) if j == 0 else part.mix[i, j - 1])
        + part.scale[0] * dot(seen[i], part.to_alpha[j])
    )
    beta = [part.beta[i] + part.scale[1] * dot(seen[i], part.to_beta[0]) for i in range(n)]
    y = layer(sum(alpha(i, 0) * h[i] for i in range(n)))
    return [sum(alpha(i, j + 1) * h[i] for i in range(n)) + beta[j] * y for j in range(n)]


@pytest.mark.parametrize("between", [False, True])
def test_hyper_connections_are_the_papers_stream_by_stream(between: bool) -> None:
    """A block of another kind between adds to all streams alike."""
    blocks, x, plain = hyper(3), inputs(), cast(Any, build("prenorm"))
    h = [x] * 3
    ctx, found = Ctx(LAYOUT, Causal()), x
    for i, block in enumerate(blocks):
        for j, name in enumerate(("mixer", "ffn")):
            run = getattr(block, name)
            normed = getattr(block, f"{name}_norm")
            part = getattr(block, f"{name}_connections")
            h = connected(part, h, 2 * i + j, lambda v, r=run, w=normed: apply(r, w(v)))
        out = block(found, replace(ctx, visit=i))
        found, ctx = out.y, out.ctx
        if between and i == 0:
            more = apply(plain, found) - found
            h, found = [x + more for x in h], found + more
    torch.testing.assert_close(found, sum(h) / 3)


@pytest.mark.parametrize("settings", [{}, {"dynamic": False}, {"streams": 1}])
def test_hyper_connections_begin_as_a_prenorm_stack(settings: dict[str, Any]) -> None:
    build_stack = lambda block: StackConfig(depth=3, block=block).build(D).double()
    plain, wide = build_stack("prenorm"), build_stack({"kind": "hyper", **settings})
    for stack in (plain, wide):
        init_weights(stack)
    own = {k: v for k, v in plain.state_dict().items()}
    missing = wide.load_state_dict(own, strict=False).missing_keys
    assert missing and all("connections" in name for name in missing)
    torch.testing.assert_close(apply(wide, inputs()), apply(plain, inputs()))
