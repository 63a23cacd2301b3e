"""Every mixer under bf16 autocast, as mixed-precision training runs it."""

from __future__ import annotations

import pytest
import torch
from laws import VARIANTS, D, build, context

from mm.kernels.delta_rule import delta_rule
from mm.kernels.linear_attention import linear_attention
from mm.kernels.op import Op
from mm.layout import Layout


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith(("mixer:", "preset:"))])
def test_a_mixer_trains_under_autocast(name: str) -> None:
    """Close to float32, and with a gradient for every parameter that has one there."""
    layer = build(name, torch.float32)
    T = min(70, getattr(layer, "max_len", None) or 70)
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
    ctx = context(layer, x, Layout.plain(2, T))
    found = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(leaf, ctx).y
        grads = torch.autograd.grad(y.float().square().mean(), [leaf, *layer.parameters()])
        found.append([y.detach().float(), *grads])
    assert all(narrow.isfinite().all() for narrow in found[1])
    if name == "mixer:topk_attention":
        return  # rounding changes which keys are the largest, and so what is read at all
    wide, narrow = found[0][0], found[1][0]
    assert (wide - narrow).norm() < 0.1 * wide.norm()


FAST = {"delta_rule": "chunk", "linear_attention": "chunked"}


@pytest.mark.parametrize("op", [delta_rule, linear_attention], ids=lambda op: op.name)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "reference"])
def test_products_of_float32_stay_float32(op: Op, fast: bool) -> None:
    """Bit for bit what they are without autocast; a hand-written backward also inside it."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 8, generator=g).requires_grad_() for _ in range(3))
    decay = -torch.rand(1, 70, 2, generator=g)
    more = (torch.rand(1, 70, 2, generator=g), decay) if op is delta_rule else (decay,)
    found = []
    for enabled in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            op.using(FAST[op.name] if fast else "reference"),
        ):
            o, last = op(q * 0.3, k * 0.3, v, *more)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and fast):
            grads = torch.autograd.grad(o.sum() + last.sum(), (q, k, v))
        found.append((o, last, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
