"""Mixers that wrap mixers: read both ways, in another order, and subtracted. B rows, T tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import D, build, documents
from torch import Tensor

from mm.errors import UserError
from mm.layout import Doc, Grid, Layout
from mm.mask import Causal, Full, Mask, Prefix
from mm.model.context import Ctx
from mm.model.layer import Layer, init_weights
from mm.model.mixers.wrappers.bidirectional import Bidirectional, BidirectionalConfig
from mm.model.mixers.wrappers.differential import Differential, DifferentialConfig
from mm.model.mixers.wrappers.scan_order import Order, ScanOrder, ScanOrderConfig, order_of
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


def grids(prefix: bool = False) -> Layout:
    """A row of two documents with words and grids, then padding.

    Two words, a 2 x 3 and a 3 x 2 grid and a word in one document, then a 2 x 3 grid as another.
    With ``prefix`` the first grid alone is in it.
    """
    extra = {"prefix": np.arange(15) < 8} if prefix else {}
    first = Doc(15, grids=[Grid(2, (2, 3)), Grid(8, (3, 2))], extra=extra)
    return Layout.from_rows([[first, Doc(6, grids=[Grid(0, (2, 3))])]], 23, axes=3)


def test_layouts_say_where_cells_are() -> None:
    layout = grids()
    assert layout.grids[2, 3].tolist() == [[*range(2, 8)], [*range(15, 21)]]
    assert layout.grids[3, 2].tolist() == [[*range(8, 14)]]
    position = layout.fields.position[0]
    assert position[:, 0].tolist() == [*range(15), *range(6), 0, 0]
    assert position[2:9, 1:].tolist() == [[2, 2], [2, 3], [2, 4], [3, 2], [3, 3], [3, 4], [8, 8]]
    assert position[14].tolist() == [14] * 3
    books = Layout.from_rows([[Doc(9, grids=[Grid(1, (2, 2), 2)])]], axes=3)
    assert books.grids[2, 2].tolist() == [[1, 3, 5, 7], [2, 4, 6, 8]]
    assert books.fields.position[0, 5:9, 1:].tolist() == [[2, 1], [2, 1], [2, 2], [2, 2]]
    part = Layout.from_rows([[Doc(4, grids=[Grid(0, (2, 3), length=4)])]], axes=3)
    assert not part.grids
    assert part.fields.position[0, 3].tolist() == [3, 1, 0]


RASTERS: dict[Order, list[int]] = {  # of a 2 x 3 grid
    "row": [0, 1, 2, 3, 4, 5],
    "column": [0, 3, 1, 4, 2, 5],
    "snake": [0, 1, 2, 5, 4, 3],
    "diagonal": [0, 1, 3, 2, 4, 5],
    "hilbert": [0, 1, 4, 3, 5, 2],
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("order", RASTERS)
def test_every_order_of_a_grid_is_the_mixer_on_the_permuted_cells(
    order: Order, reverse: bool
) -> None:
    inner = MIXERS.get("gated_scan").smallest()
    layer = made(ScanOrderConfig(inner=inner, orders=(order,), reverse=reverse))
    assert isinstance(layer, ScanOrder)
    layout, x = grids(), torch.cat(documents(15, 6, 2))
    y = run(layer, x, layout, Full())[0]
    turn = RASTERS[order][::-1] if reverse else RASTERS[order]
    assert order_of(order, (2, 3)).tolist() == RASTERS[order]
    second = order_of(order, (3, 2)).tolist()
    second = second[::-1] if reverse else second
    read = [0, 1, *(2 + c for c in turn), *(8 + c for c in second), 14]
    for at, order_read in ((0, read), (15, turn)):
        doc = x[at : at + len(order_read)]
        expected = run(layer.inners[0], doc[order_read], Layout.plain(1, len(doc)), Causal())[0]
        torch.testing.assert_close(y[at : at + len(doc)][order_read], expected)
    if order == "row" and not reverse:
        torch.testing.assert_close(
            run(layer, x, layout, Causal()), run(layer.inners[0], x, layout, Causal())
        )
    else:
        with pytest.raises(UserError, match=f"{order} shows cells of a grid their future"):
            run(layer, x, layout, Causal())


@pytest.mark.parametrize("order", ["snake", "hilbert"])
@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (1, 8)])
def test_snakes_and_hilbert_curves_go_from_neighbour_to_neighbour(
    order: Order, shape: tuple[int, int]
) -> None:
    cells = np.stack(np.unravel_index(order_of(order, shape), shape), 1)
    if order == "snake" or shape[0] == shape[1]:
        assert (np.abs(np.diff(cells, axis=0)).sum(1) == 1).all()
    assert sorted(map(tuple, cells)) == [*np.ndindex(*shape)]


def test_a_cross_scan_shows_every_cell_to_every_cell_and_one_order_does_not() -> None:
    inner = MIXERS.get("gated_scan").smallest()
    cross = ("row", "row", "column", "column")
    ways = (False, True, False, True)
    layout = Layout.from_rows([[Doc(12, grids=[Grid(0, (3, 4))])]], axes=3)

    def moved(orders: tuple[Order, ...], reverse: tuple[bool, ...]) -> Tensor:
        layer = made(ScanOrderConfig(inner=inner, orders=orders, reverse=reverse))
        f = lambda x: run(layer, x, layout, Full())[0]
        return torch.autograd.functional.jacobian(f, documents(12)[0]).abs().sum((1, 3)) > 0

    assert moved(cross, ways).all()
    assert not moved(cross[:1], ways[:1]).all()


def test_grids_of_a_prefix_are_permuted_and_decoding_goes_on_from_them() -> None:
    """What follows the prefix stays causal: served in pieces it equals the whole."""
    layer, layout = made(ScanOrderConfig.smallest()), grids(prefix=True)
    x = torch.cat(documents(15, 6, 2))
    whole = run(layer, x, layout, Prefix())[0, :15]
    plain = run(layer, x, replace(layout, grids={}), Prefix())[0, :15]
    changed = (whole - plain).abs().amax(1) > 1e-9
    assert changed[3:8].any() and changed[8:15].all() and not changed[:2].any()
    only = replace(layout, grids={(2, 3): layout.grids[2, 3][:1]})
    torch.testing.assert_close(whole, run(layer, x, only, Prefix())[0, :15])
    extra, state, got = np.arange(15) < 8, layer.initial_state(1, 15), []
    for start, stop in ((0, 9), (9, 10), (10, 15)):
        doc = Doc(
            stop - start, slot=0, fresh=start == 0, start=start,
            extra={"prefix": extra[start:stop]}, grids=[Grid(2, (2, 3))] if start == 0 else [],
        )  # fmt: skip
        out = layer(x[None, start:stop], Ctx(Layout.from_rows([[doc]], axes=3), Prefix()), state)
        state = out.state
        got.append(out.y[0])
    torch.testing.assert_close(torch.cat(got), whole)


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
