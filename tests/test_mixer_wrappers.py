"""Mixers that wrap mixers: read both ways, in another order, and subtracted. B rows, T tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from laws import D, build, documents
from torch import Tensor

from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal, Full, Mask, Prefix
from mm.model.layer import Ctx, Layer, init_weights
from mm.model.mixers.bidirectional import Bidirectional, BidirectionalConfig
from mm.model.mixers.differential import Differential, DifferentialConfig
from mm.model.mixers.scan_order import ScanOrder, ScanOrderConfig
from mm.registry import MIXERS


def run(layer: Layer, x_TD: Tensor, layout: Layout, mask: Mask) -> Tensor:
    return layer(x_TD.view(*layout.shape, D), Ctx(layout, mask)).y


def made(config) -> Layer:
    torch.manual_seed(5)
    layer = config.build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.double()


def prefixed(*documents_: tuple[int, int]) -> Layout:
    """One row of documents of (prefix, suffix) tokens and a place of padding."""
    row = [Doc(p + s, extra={"prefix": np.arange(p + s) < p}) for p, s in documents_]
    return Layout.from_rows([row], sum(p + s for p, s in documents_) + 1)


INNER = ["s4d", "gated_scan", "mamba", "linear_attention", "attention"]


@pytest.mark.parametrize("kind", INNER)
def test_a_full_mask_sums_a_forward_and_a_reversed_pass_in_every_document(kind: str) -> None:
    layer = made(BidirectionalConfig(inner=MIXERS.get(kind).smallest()))
    assert isinstance(layer, Bidirectional)
    docs = documents(5, 1, 8)
    layout = Layout.from_rows([[Doc(5), Doc(1), Doc(8)]], 16)
    x = torch.cat((*docs, torch.full((2, D), 1e3, dtype=torch.float64)))
    got = run(layer, x, layout, Full())[0, :14].split([5, 1, 8])
    for doc, y in zip(docs, got, strict=True):
        plain = Layout.plain(1, len(doc))
        ahead = run(layer.ahead, doc, plain, Causal())[0]
        back = run(layer.back, doc.flip(0), plain, Causal())[0].flip(0)
        torch.testing.assert_close(y, ahead + back)


def test_a_prefix_sees_itself_both_ways_and_the_rest_only_the_past() -> None:
    layer, T = made(BidirectionalConfig(inner=MIXERS.get("s4d").smallest())), 9
    layout = prefixed((4, 5), (0, 3), (2, 0))
    x = torch.cat(documents(9, 3, 2, 1))
    moved = (
        torch.autograd.functional.jacobian(lambda x: run(layer, x, layout, Prefix())[0, :14], x)
        .abs()
        .sum((1, 3))
    )
    assert moved[:4, :4].gt(0).all(), "the prefix sees all of the prefix"
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    later[:4, :4] = False
    assert moved[:9, :9][later].eq(0).all(), "nothing else sees what comes later"
    assert moved[9:12, 9:12].triu(1).eq(0).all() and moved[12:14, 12:14].gt(0).all()
    assert moved[:9, 9:].eq(0).all() and moved[9:12, :9].eq(0).all()


def test_steps_after_a_prefix_equal_the_whole() -> None:
    layer = made(BidirectionalConfig(inner=MIXERS.get("mamba").smallest()))
    (x,) = documents(7)
    whole = run(layer, torch.cat((x, x[:1])), prefixed((4, 3)), Prefix())[0, :7]
    state, ys = layer.initial_state(1, 8), []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        extra = {"prefix": np.arange(start, stop) < 4}
        doc = Doc(stop - start, slot=0, fresh=start == 0, start=start, extra=extra)
        out = layer(x[None, start:stop], Ctx(Layout.from_rows([[doc]]), Prefix()), state)
        state = out.state
        ys.append(out.y[0])
    torch.testing.assert_close(torch.cat(ys), whole)


@pytest.mark.parametrize("name", ["mixer:bidirectional", "mixer:scan_order"])
def test_a_state_under_a_full_mask_is_refused(name: str) -> None:
    layer = build(name)
    with pytest.raises(UserError, match="whole documents"):
        x = torch.zeros(1, 2, D, dtype=torch.float64)
        layer(x, Ctx(Layout.plain(1, 2), Full()), layer.initial_state(1, 4))


def grids() -> tuple[Layout, list[list[tuple[int, int]]]]:
    """A row of a 2 x 3 and a 3 x 2 grid in raster order, and a place of padding."""
    cells = [[(r, c) for r in range(a) for c in range(b)] for a, b in ((2, 3), (3, 2))]
    docs = [
        Doc(6, position=np.array([(t, r, c) for t, (r, c) in enumerate(grid)])) for grid in cells
    ]
    return Layout.from_rows([docs], 13), cells


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axes", [(0,), (1, 2), (2, 1)])
def test_every_order_of_a_grid_is_the_mixer_on_the_permuted_cells(
    axes: tuple[int, ...], reverse: bool
) -> None:
    inner = MIXERS.get("gated_scan").smallest()
    layer = made(ScanOrderConfig(inner=inner, axes=axes, reverse=reverse))
    assert isinstance(layer, ScanOrder)
    layout, cells = grids()
    x = torch.cat(documents(6, 6, 1))
    y = run(layer, x, layout, Full())[0]
    for d, grid in enumerate(cells):
        key = (lambda c: c) if axes != (2, 1) else (lambda c: c[::-1])
        order = sorted(range(6), key=lambda i: key(grid[i]), reverse=reverse)
        doc = x[6 * d : 6 * d + 6]
        expected = run(layer.inner, doc[order], Layout.plain(1, 6), Causal())[0]
        torch.testing.assert_close(y[6 * d : 6 * d + 6][order], expected)
    # Any other mask keeps the order of time, the only one that shows no token its future.
    ahead = run(layer, x, layout, Causal())
    torch.testing.assert_close(ahead, run(layer.inner, x, layout, Causal()))


def test_a_cycle_of_orders_shows_every_cell_to_every_cell() -> None:
    inner = MIXERS.get("gated_scan").smallest()
    orders = [((1, 2), False), ((1, 2), True), ((2, 1), False), ((2, 1), True)]
    layers = [made(ScanOrderConfig(inner=inner, axes=a, reverse=r)) for a, r in orders]
    layout = Layout.from_rows([[Doc(6, position=np.array([(0, i // 3, i % 3) for i in range(6)]))]])

    def cycle(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + run(layer, x, layout, Full())[0]
        return x

    moved = torch.autograd.functional.jacobian(cycle, documents(6)[0]).abs().sum((1, 3))
    assert moved.gt(0).all()


def test_an_axis_that_is_not_there_is_refused() -> None:
    layer = made(ScanOrderConfig(inner=MIXERS.get("gated_scan").smallest(), axes=(2,)))
    with pytest.raises(UserError, match="axis 2"):
        run(layer, documents(3)[0], Layout.plain(1, 3), Full())


@pytest.mark.parametrize("kind", ["mamba", "attention"])
def test_differential_subtracts_the_second_branch_before_the_norm(kind: str) -> None:
    layer = made(DifferentialConfig(inner=MIXERS.get(kind).smallest()))
    assert isinstance(layer, Differential)
    (x,) = documents(7)
    ctx = Ctx(Layout.plain(1, 7), Causal(), visit=3)
    one, two = (m(x[None], ctx).y for m in (layer.first, layer.second))
    constant = 0.8 - 0.6 * math.exp(-0.9)
    share = layer.share.sigmoid() + constant
    expected = (1 - constant) * layer.norm(one - share * two)
    torch.testing.assert_close(layer(x[None], ctx).y, expected)
    lambdas = [layer.share_at(n)[0] for n in (0, 5, 50)]
    assert lambdas[0] < lambdas[1] < lambdas[2] < 2
