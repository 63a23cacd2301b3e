"""Mixture of experts against a plain loop over tokens and experts.

Gradients, capacity, balance, recomputation. R tokens, E experts, D model.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.ffn.experts import make_plan
from mm.model.ffn.moe import MoE, MoeConfig
from mm.model.layer import Out, init_weights

D, T = 8, 12
LAYOUT = Layout.from_rows([[Doc(5), Doc(4)], [Doc(10)]], T)  # padding: 3 and 2
FORMS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax": {"gate": "softmax"},
    "softmax of one": {"gate": "softmax", "top_k": 1, "normalise": False},
    "sigmoid, shared": {"shared": 1, "scale": 2.0},
    "softmax, shared with a gate": {"gate": "softmax", "shared": 2, "shared_gate": True},
    "not normalised, no gate": {"normalise": False, "gated": False, "activation": "relu_squared"},
    "all experts": {"top_k": 4, "activation": "gelu"},
    "capacity": {"capacity": 0.75},
}
forms = pytest.mark.parametrize("form", FORMS)


def build(experts: int = 4, dtype: torch.dtype = torch.float64, **values: Any) -> MoE:
    torch.manual_seed(0)
    layer = cast(Any, MoeConfig(**{"experts": experts, "hidden": 6, **values})).build(D)
    init_weights(layer)
    with torch.no_grad():
        bias_of(layer).normal_()
    return layer.to(dtype)


def bias_of(layer: MoE) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def apply(layer: MoE, x: Tensor, layout: Layout = LAYOUT) -> Out:
    return layer(x, Ctx(layout, Causal()))


def by_loop(layer: MoE, x: Tensor, layout: Layout = LAYOUT) -> tuple[Tensor, int]:
    """The paper's formula, one token and one expert at a time, and how many choices are dropped.

    First choices of all tokens are served before any second choice.
    """
    c, act = layer.config, {"silu": F.silu, "gelu": F.gelu, "relu_squared": lambda h: h.relu() ** 2}
    y = [torch.zeros(D, dtype=x.dtype) for _ in range(x.shape[0] * x.shape[1])]
    real = (layout.fields.document.flatten() > 0).tolist()
    most = c.capacity * c.top_k * sum(real) / c.experts if c.capacity and layer.training else 1e9
    used, dropped = [0] * c.experts, 0
    for choice in range(c.top_k):
        for r, token in enumerate(x.flatten(0, 1)):
            if not real[r]:
                continue
            logits = layer.router.weight @ token
            score = logits.softmax(0) if c.gate == "softmax" else logits.sigmoid()
            best = (score + bias_of(layer)).topk(c.top_k).indices.tolist()
            e, norm = best[choice], score[best].sum() if c.normalise else 1.0
            if used[e] >= most:
                dropped += 1
                continue
            used[e] += 1
            hidden = layer.up.weight[e] @ token
            if c.gated:
                hidden = act[c.activation](hidden[:6]) * hidden[6:]
            else:
                hidden = act[c.activation](hidden)
            y[r] = y[r] + c.scale * score[e] / norm * (layer.out.weight[e] @ hidden)
    whole = torch.stack(y).view_as(x)
    if layer.shared is not None:
        always = layer.shared(x, Ctx(layout, Causal())).y
        if layer.shared_gate is not None:
            always = always / (1 + (-x @ layer.shared_gate.weight.T).exp())
        whole = whole + always
    return whole, dropped


@forms
def test_outputs_and_all_gradients_are_those_of_a_plain_loop(form: str) -> None:
    layer = build(**FORMS[form]).train()
    x, weight = (torch.randn(2, T, D, dtype=torch.float64) for _ in "xw")
    weight[LAYOUT.fields.document == 0] = 0
    results = []
    for run in (lambda x: apply(layer, x).y, lambda x: by_loop(layer, x)[0]):
        given = x.clone().requires_grad_()
        y = run(given)
        grads = torch.autograd.grad((y * weight).sum(), [given, *layer.parameters()])
        results.append([y * (weight != 0), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert all(g.abs().sum() > 0 for g in results[0]), "every weight learns"


def test_dropped_choices_are_counted_and_pass_by() -> None:
    """In training alone: evaluation and serving drop nothing, the dropless form never does."""
    layer, x = build(capacity=0.5).train(), torch.randn(2, T, D, dtype=torch.float64)
    _, dropped = by_loop(layer, x)
    assert dropped > 2 and not layer.caps.exact
    out = apply(layer, x)
    assert float(out.aux["dropped"].total) == dropped
    assert float(out.aux["dropped"].mean()) == pytest.approx(dropped / (2 * 19))
    free = build()
    assert free.caps.exact and float(apply(free.train(), x).aux["dropped"].total) == 0
    real = LAYOUT.fields.document > 0
    assert torch.equal(apply(layer.eval(), x).y[real], apply(free, x).y[real])


def test_a_plan_gives_every_choice_a_place_and_begins_experts_at_blocks() -> None:
    expert = torch.tensor([2, 0, 3, 2, 3, 2])  # 3: padding
    plan = make_plan(expert, 3, most=torch.tensor(2))
    assert plan.ends.tolist() == [16, 16, 32] and plan.load.tolist() == [1, 0, 3]
    assert plan.row.tolist() == [16, 0, -1, 17, -1, -1]
    assert plan.kept.tolist() == [True, True, False, True, False, False]
    assert {int(p): i for i, p in enumerate(plan.choice) if p >= 0} == {1: 0, 0: 16, 3: 17}


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_losses_are_the_formulas_of_their_papers(gate: str) -> None:
    layer, x = build(gate=gate).train(), torch.randn(2, T, D, dtype=torch.float64)
    aux = apply(layer, x).aux
    real = LAYOUT.fields.document > 0
    logits = x[real] @ layer.router.weight.T
    score = logits.softmax(-1) if gate == "softmax" else logits.sigmoid()
    p = score / score.sum(-1, keepdim=True)
    chosen = (score + bias_of(layer)).topk(2).indices
    load = F.one_hot(chosen, 4).sum((0, 1)).double()
    even = load / load.sum()
    close = lambda name, wanted: torch.testing.assert_close(aux[name].mean(), wanted)
    torch.testing.assert_close(aux["load"].total, load)
    close("balance", 4 * (even * p.mean(0)).sum())
    close("router_z", logits.logsumexp(-1).square().mean())
    close("load_max", load.max() / load.mean())
    close("router_entropy", -(p * p.log()).sum(-1).mean())
    for name in ("balance", "router_z"):  # they teach the router
        (grad,) = torch.autograd.grad(
            aux[name].total, [layer.router.weight], retain_graph=name == "balance"
        )
        assert grad.abs().sum() > 0
    assert not apply(layer.eval(), x).aux


def skewed(**values: Any) -> tuple[MoE, Tensor, Layout]:
    """A router that sends almost all tokens to experts 0 and 1: inputs share a direction."""
    layer = build(8, torch.float32, **values).train()
    with torch.no_grad():
        bias_of(layer).zero_()
        layer.router.weight[:2] += 0.5
    g = torch.Generator().manual_seed(0)
    return layer, torch.randn(4, 256, D, generator=g) + 1, Layout.plain(4, 256)


def test_the_bias_evens_the_load_of_a_skewed_router() -> None:
    """It ends within 20 % of even, from 3.9 times the mean; gates and weights do not move."""
    layer, x, layout = skewed(bias_rate=0.003)
    before = {k: v.clone() for k, v in layer.named_parameters()}
    first = apply(layer, x, layout).aux["load_max"].mean()
    assert first > 3
    for _ in range(300):
        layer.after_step(apply(layer, x, layout).aux)
    load = apply(layer, x, layout).aux["load"].total
    even = load / load.mean()
    assert even.max() < 1.2 and even.min() > 0.8
    assert all(torch.equal(before[k], v) for k, v in layer.named_parameters())


def test_without_a_rate_there_is_no_bias_and_the_loss_evens_the_load() -> None:
    layer, x, layout = skewed(bias_rate=0.01)
    layer.bias = None
    assert "bias" not in dict(MoeConfig(bias_rate=0.0).build(D).named_buffers())
    step = torch.optim.Adam([layer.router.weight], 0.03)
    for _ in range(100):
        step.zero_grad()
        apply(layer, x, layout).aux["balance"].mean().backward()
        step.step()
    assert apply(layer, x, layout).aux["load_max"].mean() < 1.5


def test_the_bias_stays_float32_in_a_bfloat16_model() -> None:
    layer = build().bfloat16()
    assert bias_of(layer).dtype == torch.float64
    assert layer.router.weight.dtype == torch.bfloat16
    x = torch.randn(2, T, D).bfloat16()
    assert apply(layer, x).y.dtype == torch.bfloat16


def test_autocast_takes_the_experts_and_leaves_the_router() -> None:
    layer, x = build(dtype=torch.float32).train(), torch.randn(2, T, D)
    plain = apply(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = apply(layer, x)
    assert torch.equal(out.aux["load"].total, plain.aux["load"].total)
    assert out.y.dtype == torch.bfloat16
    torch.testing.assert_close(out.y.float(), plain.y, rtol=0.1, atol=0.1)


@forms
def test_recomputation_gives_the_same_bits_and_statistics(form: str) -> None:
    layer, x = build(**FORMS[form]).train(), torch.randn(2, T, D, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        given, ctx = x.clone().requires_grad_(), Ctx(LAYOUT, Causal())
        out = checkpoint(layer, given, ctx, use_reentrant=False) if recompute else layer(given, ctx)
        loss = out.y.square().sum() + out.aux["balance"].total + out.aux["router_z"].total
        grads = torch.autograd.grad(loss, [given, *layer.parameters()])
        found.append([out.y, *(s.total for s in out.aux.values()), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_cannot_choose_is_refused() -> None:
    with pytest.raises(ValidationError, match="top_k 9 is more than experts 8"):
        MoeConfig(top_k=9)
    with pytest.raises(ValidationError, match="top_k 1 needs normalise: false"):
        MoeConfig(top_k=1)
