"""Prefix linear attention against its equation. B rows, T tokens, D model, H heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from laws import D, alone, build, documents
from torch import Tensor

from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Prefix
from mm.model.backbones.stack import StackConfig
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.linear_attention.prefix_linear_attention import (
    PrefixLinearAttention,
    PrefixLinearAttentionConfig,
)


def doc(prefix: int, start: int, stop: int, **settings: object) -> Doc:
    extra = {"prefix": (np.arange(start, stop) < prefix).astype(np.int32)}
    return Doc(stop - start, extra=extra, start=start, fresh=start == 0, **settings)


def by_equation(layer: PrefixLinearAttention, x: Tensor, M: int) -> Tensor:
    """Linear attention over text and encoded prefix, token by token and head by head.

    ``o_i = phi(q_i) (sum_j phi(k_j) v_j + sum_{j <= M} phi(k^e_j) v^e_j) / (the same of 1)`` with j
    up to max(i, M).
    """
    inner = layer.inner
    f, _ = inner.features(x[None], Ctx(Layout.plain(1, len(x)), Prefix()))
    q, k, v = (f[n][0] for n in "qkv")
    ke, ve = layer.encoder(x).split(layer.sizes, -1)
    ke = inner._map(ke.view(1, len(x), inner.heads, -1))[0]
    ve = ve.view(len(x), inner.heads, -1)
    out = []
    for i in range(len(x)):
        end = max(i + 1, M)
        heads = []
        for h in range(inner.heads):
            own, extra = k[:end, h] @ q[i, h], ke[:M, h] @ q[i, h]
            total = own.sum() + extra.sum() + 1e-6
            heads.append((own @ v[:end, h] + extra @ ve[:M, h]) / total)
        out.append(torch.stack(heads))
    return inner.finish(torch.stack(out)[None], x[None], f, Ctx(Layout.plain(1, 1), Prefix()))[0]


def made(word: str) -> PrefixLinearAttention:
    torch.manual_seed(4)
    layer = StackConfig(pattern=word).mixer(word).build(D)
    init_weights(layer)
    return layer.double()  # type: ignore[return-value]


@pytest.mark.parametrize("word", ["prefix_linear_attention", "jrt"])
def test_packed_prefixes_equal_the_equation_in_all_gradients(word: str) -> None:
    layer, sizes = made(word), [(4, 9), (0, 3), (1, 1), (5, 5)]
    docs = [x.requires_grad_() for x in documents(*(n for _, n in sizes))]
    layout = Layout.from_rows([[doc(m, 0, n) for m, n in sizes]], 20)
    pad = torch.full((2, D), 1e2, dtype=torch.float64)
    y = layer(torch.cat((*docs, pad))[None], Ctx(layout, Prefix())).y[0, :18]
    expected = torch.cat([by_equation(layer, x, m) for x, (m, _) in zip(docs, sizes, strict=True)])
    found = []
    for o in (y, expected):
        leaves = [*docs, *layer.parameters()]
        found.append((o, *torch.autograd.grad(o.sin().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_without_a_prefix_it_is_the_wrapped_mixer() -> None:
    layer = build("mixer:prefix_linear_attention")
    assert isinstance(layer, PrefixLinearAttention)
    (x,) = documents(11)
    torch.testing.assert_close(alone(layer, x), alone(layer.inner, x))
    y = layer(x[None], Ctx(Layout.from_rows([[doc(0, 0, 11)]]), Prefix())).y[0]
    torch.testing.assert_close(y, alone(layer.inner, x))


@pytest.mark.parametrize("draft", [False, True])
def test_decoding_after_a_prefix_equals_the_whole(draft: bool) -> None:
    layer, (x,) = made("prefix_linear_attention"), documents(9)
    whole = layer(x[None], Ctx(Layout.from_rows([[doc(4, 0, 9)]]), Prefix())).y[0]
    state, ys = layer.initial_state(1, 9), []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        ctx = Ctx(Layout.from_rows([[doc(4, start, stop, slot=0)]]), Prefix(), draft=draft)
        out = layer(x[None, start:stop], ctx, state)
        assert out.state is not None
        state = out.state.accept(torch.tensor([stop - start])) if draft else out.state
        ys.append(out.y[0])
    torch.testing.assert_close(torch.cat(ys), whole)


def test_other_mixers_are_refused() -> None:
    for word in ("mamba2", "retnet", "attention"):
        with pytest.raises(UserError, match="decay: none"):
            PrefixLinearAttentionConfig(inner=StackConfig(pattern=word).mixer(word)).build(D)
