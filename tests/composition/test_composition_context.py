"""The context moves with the vectors; what a layer publishes reaches the next. B rows, T tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from composition_cases import MARKED, lay, packed_rows
from composition_checks import outputs, recorded, run
from composition_configs import (
    D,
    Refused,
    all_mixers,
    build,
    fixed,
    layers,
    variants,
    wrappers,
)
from torch import Tensor, nn

from mm.errors import UserError
from mm.layout import Doc, Grid, Layout
from mm.mask import Causal, Full, Mask, Prefix
from mm.model.backbones.stack import Stack
from mm.model.context import Ctx
from mm.model.layer import Block, FeedForward, Layer, Mixer, Out, init_weights
from mm.registry import BLOCKS, MIXERS, POSITIONS
from mm.state import State


class Probe(Mixer):
    """The identity, that checks that ids and documents of its Ctx are those of its vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        assert ctx.ids is not None
        document = ctx.layout.fields.document
        real = document > 0
        for name, channel, moved in (("ids", 0, ctx.ids[..., 0]), ("documents", 1, document)):
            if not torch.equal(x_BTD[..., channel][real], moved[real].to(x_BTD)):
                pytest.fail(f"{name} stay behind", pytrace=False)
        for number, first in enumerate(ctx.layout.cu_seqlens[:-1].tolist(), 1):
            inside = (document.flatten() == number).nonzero()[:, 0]
            if len(inside):
                assert inside[0] == first and len(inside) == inside[-1] - first + 1
        self.seen += 1
        return Out(x_BTD)


def called_inside(wrapper: str, ctx: Ctx) -> tuple[Mixer, list[Mixer]]:
    """A wrapper, and the mixers that it calls as they are (not piece by piece)."""
    layer = cast(Any, MIXERS.get(wrapper).smallest()).build(D)
    init_weights(layer)
    with recorded(layer) as calls:
        layer(torch.randn(*ctx.layout.shape, D), ctx)
    return layer, [m for m, *_ in calls if m is not layer and isinstance(m, Mixer)]


def put(layer: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """``new`` where ``old`` stands in the tree of ``layer``."""
    for module in layer.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)


@pytest.mark.parametrize("wrapper", wrappers())
@pytest.mark.parametrize("mask", [Causal(), Prefix(), Full()], ids=str)
def test_ids_and_documents_move_with_the_vectors(wrapper: str, mask: Mask) -> None:
    prefix = {"prefix": torch.arange(7).lt(6).int().numpy()}
    grid = () if isinstance(mask, Causal) else [Grid(1, (2, 2))]
    rows = [
        [Doc(7, extra=prefix, grids=grid), Doc(3)],
        [Doc(6, extra={"prefix": torch.ones(6).int().numpy()}, grids=grid)],
    ]
    layout = Layout.from_rows(rows, 11, axes=3)
    ctx = Ctx(layout, mask, torch.arange(22).view(2, 11, 1))
    layer, inside = called_inside(wrapper, ctx)
    if not inside:
        pytest.skip("it calls its mixer piece by piece")
    for mixer in inside:
        put(layer, mixer, Probe())
    x = torch.randn(2, 11, D)
    x[..., 0], x[..., 1] = ctx.ids[..., 0], layout.fields.document
    layer(x, ctx)
    assert all(m.seen for m in layer.modules() if isinstance(m, Probe))


# ---- what a layer publishes ----


class Publisher(Mixer, FeedForward):
    """The identity, that hands a number on to whatever comes later."""

    name = "composition.number"

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        number = ctx.published.get(self.name, 0) + 1
        return Out(x_BTD, None, replace(ctx, published={**ctx.published, self.name: number}))


def assert_handed_on(layer: Layer, times: int) -> None:
    ctx = Ctx(Layout.plain(1, 4), Causal(), torch.arange(4).view(1, 4, 1))
    out = layer(torch.randn(1, 4, D), ctx)
    assert out.ctx is not None, "what its layer published is lost"
    assert out.ctx.published[Publisher.name] == times
    assert out.ctx.layout is ctx.layout and out.ctx.mask == ctx.mask


@pytest.mark.parametrize("block", variants(BLOCKS), ids=str)
def test_blocks_and_stacks_hand_on_what_their_layers_publish(block: dict[str, Any]) -> None:
    made: list[Block] = [
        cast(Any, BLOCKS.parse(block)).build(D, Publisher(), Publisher()) for _ in range(2)
    ]
    stack = Stack(made, D, 1e-6, "none")
    init_weights(stack)
    assert_handed_on(made[0], 2)
    assert_handed_on(stack, 4)


@pytest.mark.parametrize("wrapper", wrappers())
def test_wrappers_hand_on_what_their_mixers_publish(wrapper: str) -> None:
    ctx = Ctx(Layout.plain(1, 4), Causal(), torch.arange(4).view(1, 4, 1))
    layer, inside = called_inside(wrapper, ctx)
    if not inside:
        pytest.skip("it calls its mixer piece by piece")
    for mixer in inside:
        put(layer, mixer, Publisher())
    assert_handed_on(layer, len(inside))


# ---- what a pass made is read by no other ----


SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in ("causal", "full", "window")]


@pytest.mark.parametrize("mask", ["prefix", *SLOW])
def test_a_batch_keeps_nothing_of_another_model_seed_or_mask(mask: str) -> None:
    """Every model of one layer reads the same batch in turn, as if the batch were its own."""
    mixers = [*all_mixers().values()]
    for position in variants(POSITIONS):
        numbers = POSITIONS.parse(position).to_dict().items()
        other = {k: 2 * v for k, v in numbers if isinstance(v, float)}
        mixers += [
            {"kind": "attention", "heads": 2, "position": position | settings}
            for settings in ({}, other)
        ]
    cases = [fixed({"backbone": layers(m)}, mask, MARKED) for m in mixers]
    one = lay(cases[0], packed_rows(cases[0]), pad=1)
    ran = 0
    for case in cases:
        try:
            model = build(case)
            for seed, train in ((5, True), (6, False)):
                model.train(train)
                own = lay(case, packed_rows(case), pad=1)
                wanted = outputs(run(model, case, own, seed=seed), own)
                got = outputs(run(model, case, one, seed=seed), one)
                for a, b in zip(got, wanted, strict=True):
                    assert torch.equal(a, b), case["model"]["backbone"]
                ran += 1
        except (Refused, UserError):
            continue
    assert ran > 20
