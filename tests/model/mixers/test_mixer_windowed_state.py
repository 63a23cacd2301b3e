"""The windowed state against the recurrence run again on the last tokens of every place."""

from __future__ import annotations

import pytest
import torch
from laws import D, alone, build, documents

from mm.errors import UserError
from mm.layout import Layout
from mm.mask import Causal
from mm.model.backbones.stack import StackConfig
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.linear_attention.linear_attention import LinearAttentionConfig
from mm.model.mixers.linear_attention.windowed_state import WindowedState, WindowedStateConfig


@pytest.mark.parametrize("T", [1, 3, 64, 65, 130])
@pytest.mark.parametrize("window", [1, 5, 64, 200])
def test_it_equals_the_banded_matrix_in_all_gradients(T: int, window: int) -> None:
    torch.manual_seed(0)
    inner = LinearAttentionConfig(
        heads=2, feature="silu", normalise=False, decay="scalar", conv_size=2
    )
    layer = WindowedStateConfig(inner=inner, window=window).build(D).double()
    init_weights(layer)
    x, ctx = documents(T)[0].requires_grad_(), Ctx(Layout.plain(1, T), Causal())
    f, _ = layer.inner.features(x[None], ctx)
    band = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)
    matrix = layer.inner.attention_matrix(f, ctx) * band
    o = torch.einsum("bhts,bshv->bthv", matrix, f["v"])
    expected = layer.inner.finish(o, x[None], f, ctx)[0]
    found = []
    for y in (alone(layer, x), expected):
        leaves = [x, *layer.parameters()]
        found.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_state_is_that_of_a_text_that_began_a_window_ago() -> None:
    layer = build("mixer:windowed_state")
    assert isinstance(layer, WindowedState)
    (x,) = documents(30)
    run = lambda x: layer(x[None], Ctx(Layout.plain(1, len(x)), Causal()))
    # Two tokens more than the window, which the convolution sees.
    torch.testing.assert_close(run(x).y[0, -1], run(x[-5:]).y[0, -1])
    assert (run(x).y[0, -1] - run(x[-2:]).y[0, -1]).abs().max() > 1e-6


def test_only_mixers_with_a_decay_by_head_are_wrapped() -> None:
    for word in ("gla", "linear_attention", "attention"):
        with pytest.raises(UserError, match="decays by head"):
            WindowedStateConfig(inner=StackConfig(pattern=word).mixer(word)).build(D)
