"""Lower bounds that all layers share: HGRN and HGRN2. K layers, W width."""

from __future__ import annotations

import pytest
import torch
from laws import D

from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.backbones.stack import StackConfig
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.linear_attention.lower_bounds import LowerBounds


def made(pattern: str):
    torch.manual_seed(1)
    stack = StackConfig(pattern=pattern, ffn=None).build(D)
    init_weights(stack)
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return stack.double()


def test_bounds_begin_at_zero_grow_with_depth_and_stay_below_one() -> None:
    torch.manual_seed(0)
    bounds = LowerBounds(5, 7).double()
    with torch.no_grad():
        bounds.table.normal_(std=3)
    g = bounds(Ctx(Layout.plain(1, 1), Causal()))
    assert g[0].eq(0).all() and (g[1:] > g[:-1]).all() and (g < 1).all()
    # The paper's own words: cumulative softmax over layers, shifted by one.
    expected = bounds.table.softmax(0).cumsum(0) - bounds.table.softmax(0)
    torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("word", ["hgrn", "hgrn2"])
def test_a_stack_owns_one_table_and_each_layer_reads_its_row(word: str) -> None:
    stack = made(f"{word} attention 2*{word}")
    (provider,) = stack.providers.values()
    assert provider.table.shape[0] == 3
    mixers = [layer.mixer for layer in stack.layers]
    assert [m.provider_row for m in mixers] == [0, 0, 1, 2]
    x = torch.randn(1, 6, D, dtype=torch.float64)
    ctx = Ctx(Layout.plain(1, 6), Causal())
    y = stack(x, ctx).y
    (grad,) = torch.autograd.grad(y.square().sum(), provider.table)
    assert grad.isfinite().all() and grad[:2].abs().sum() > 0
    # The same layers with bounds written in by hand: each one's own.
    table = provider(ctx)
    shared = {next(iter(stack.providers)): table}
    by_hand = x
    for layer in stack.layers:
        by_hand = layer(by_hand, Ctx(ctx.layout, ctx.mask, provided=shared)).y
    torch.testing.assert_close(stack.norm(by_hand), y)


def test_decays_respect_the_bound_of_their_layer() -> None:
    stack = made("3*hgrn2")
    (name,), (provider,) = stack.providers.keys(), stack.providers.values()
    ctx = Ctx(Layout.plain(1, 9), Causal())
    table = provider(ctx)
    x = 30 * torch.randn(1, 9, D, dtype=torch.float64)
    lowest = []
    for k, layer in enumerate(stack.layers):
        f, _ = layer.mixer.features(x, Ctx(ctx.layout, ctx.mask, provided={name: table}))
        a = f["g"].exp().flatten(2)
        assert (a >= table[k] - 1e-12).all() and (a <= 1).all()
        torch.testing.assert_close(f["k"], 1 - f["g"].exp())
        lowest.append(a.min().item())
    assert lowest[0] < 1e-6 < lowest[1], "only the first layer may forget all"


def test_a_stack_with_shared_bounds_steps_as_it_reads() -> None:
    stack = made("hgrn hgrn2 hgrn")
    assert len(stack.providers) == 1 and stack.providers[f"lower_bounds_{D}"].table.shape[0] == 3
    x = torch.randn(1, 5, D, dtype=torch.float64)
    whole = stack(x, Ctx(Layout.plain(1, 5), Causal())).y
    state, ys = stack.initial_state(1, 5), []
    for t in range(5):
        layout = Layout.from_rows([[Doc(1, slot=0, fresh=t == 0, start=t)]])
        out = stack(x[:, t : t + 1], Ctx(layout, Causal()), state)
        state = out.state
        ys.append(out.y)
    torch.testing.assert_close(torch.cat(ys, 1), whole)
