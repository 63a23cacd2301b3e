"""Noise: no two layers or visits draw the same, and a recomputation draws what the pass drew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from composition_cases import TEXT, lay, packed_rows
from composition_checks import recorded, run
from composition_configs import D, build, fixed, layers, plain, registry_of, smallest, wrappers
from torch import Tensor

from mm.layout import Layout
from mm.mask import Causal, Full
from mm.model import noise
from mm.model.backbones.stack import Stack
from mm.model.context import Ctx
from mm.model.layer import Block, Mixer, Out, init_weights
from mm.registry import BACKBONES, BLOCKS, MIXERS
from mm.state import State


@contextmanager
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Seeds of all generators that are made inside."""
    seeds: list[int] = []
    real = noise.generator

    def spy(*args: Any) -> torch.Generator:
        made = real(*args)
        seeds.append(made.initial_seed())
        return made

    with monkeypatch.context() as patch:
        patch.setattr(noise, "generator", spy)
        yield seeds


class Noisy(Mixer):
    """Twice the input with dropout, plus a draw under a name of its own."""

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        a, b = (noise.dropout(x_BTD, p, ctx, self, n) for p, n in ((0.5, "a"), (0.25, "b")))
        return Out(a + b)


class Nested(Block):
    """A stack as a layer of another."""

    def __init__(self, inner: Stack):
        super().__init__()
        self.inner = inner

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        return self.inner(x_BTD, ctx, state)


def stack(*blocks: Block, recompute: str = "none") -> Stack:
    made = Stack(list(blocks), D, 1e-6, recompute)
    init_weights(made)
    return made.train()


def block(mixer: Mixer) -> Block:
    return cast(Any, BLOCKS.get("prenorm")()).build(D, mixer)


def noisy_wrapper(kind: str) -> tuple[Mixer, int]:
    """A wrapper whose mixers are noisy, and how many it calls."""
    layer = cast(Any, MIXERS.get(kind).smallest()).build(D)
    init_weights(layer)
    with recorded(layer) as calls:
        layer(torch.randn(1, 4, D), Ctx(Layout.plain(1, 4), Full()))
    inside = [m for m, *_ in calls if m is not layer and isinstance(m, Mixer)]
    for old in inside:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if child is old:
                    setattr(module, name, Noisy())
    return layer, len(inside)


X = torch.randn(1, 4, D)
CTX = Ctx(Layout.plain(1, 4), Full(), seed=5)


def test_layers_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with drawn(monkeypatch) as seeds:
        stack(block(Noisy()), block(Noisy()))(X, CTX)
    assert len(seeds) == len({*seeds}) == 4


def test_visits_of_one_layer_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with drawn(monkeypatch) as seeds:
        stack(block(Noisy()), block(Noisy()))(X, CTX, None, [0, 0, 1, 0])
    assert len(seeds) == len({*seeds}) == 8


def test_nested_stacks_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = lambda: Nested(stack(block(Noisy()), block(Noisy())))
    with drawn(monkeypatch) as seeds:
        stack(inner(), block(Noisy()), inner())(X, CTX, None, [0, 1, 2, 0])
    assert len(seeds) == len({*seeds}) == 14


@pytest.mark.parametrize("kind", wrappers())
def test_mixers_of_a_wrapper_draw_apart(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, count = noisy_wrapper(kind)
    if not count:
        pytest.skip("it calls its mixer piece by piece")
    for outer in (layer, stack(block(layer), block(noisy_wrapper(kind)[0]))):
        with drawn(monkeypatch) as seeds:
            outer(X, CTX)
        assert len(seeds) >= 2 * count and len(seeds) == len({*seeds})


@pytest.mark.parametrize("kind", [*BACKBONES])
def test_branches_of_all_blocks_draw_apart(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BLOCKS:
        values = smallest(BLOCKS, name)
        fields = BLOCKS.get(name).model_fields
        values |= {f: 0.5 for f in ("dropout", "rate") if f in fields}
        if "block" in fields:  # what it holds draws, too
            values["block"] = {"kind": "prenorm", "dropout": 0.5}
        backbone = smallest(BACKBONES, kind) | {"block": values}
        config = BACKBONES.get(kind).smallest()
        for field in type(config).model_fields:
            if registry_of(getattr(config, field)) is BACKBONES:  # the block of what is below
                below = plain(getattr(config, field)) | {"block": backbone["block"]}
                backbone[field] = below
        case = fixed({"backbone": backbone}, "causal", TEXT)
        model = build(case)
        seeds: dict[int, list[int]] = {}
        ys = {}
        for seed in (5, 5, 6):
            with drawn(monkeypatch) as made:
                call = lay(case, packed_rows(case))
                y = run(model, case, call, seed=seed).hidden
            assert len(made) > 2 and len(made) == len({*made})
            if seed in seeds:
                assert seeds[seed] == made and torch.equal(ys[seed], y)
            seeds[seed], ys[seed] = made, y
        assert not {*seeds[5]} & {*seeds[6]} and not torch.equal(ys[5], ys[6])


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_draws_the_same(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block_ = smallest(BLOCKS, "prenorm") | {"dropout": 0.3}
    case = fixed(
        {"backbone": layers({"kind": "gru"}, {"kind": "gru"}, block=block_)}, "causal", TEXT
    )
    plain = build(case)
    case["model"]["backbone"]["recompute"] = recompute
    again = build(case)
    again.load_state_dict(plain.state_dict())
    grads, seeds = [], []
    for model in (plain, again):
        with drawn(monkeypatch) as made:
            y = run(model, case, lay(case, packed_rows(case)), seed=9).hidden
            grads.append(torch.autograd.grad(y.square().sum(), [*model.backbone.parameters()]))
        seeds.append(made)
    assert {*seeds[0]} == {*seeds[1]} and len(seeds[1]) == 2 * len(seeds[0])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_the_same_mask_and_no_other_state_is_drawn_outside_training() -> None:
    layer = stack(block(Noisy()))
    before = torch.random.get_rng_state()
    layer(X, Ctx(Layout.plain(1, 4), Causal(), seed=1))
    assert torch.equal(before, torch.random.get_rng_state()), "global generators stay as they are"
