"""Mamba against the paper's form written out; its state, and how it starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from laws import TOL, D, alone, apply, documents, packed
from torch import Tensor

from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.ssm.mamba import Mamba
from mm.registry import MIXERS


def build(**settings: object) -> Mamba:
    torch.manual_seed(3)
    layer = MIXERS.get("mamba")(**settings).build(D)
    init_weights(layer)
    return layer.double()


def written_out(layer: Mamba, x: Tensor) -> Tensor:
    """Algorithm 2 and figure 3 of the paper, token by token, for one document `(T, D)`."""
    inner, z = (x @ layer.inner.weight.T).chunk(2, -1)
    T, E = inner.shape
    h, outs = x.new_zeros(E, layer.states), []
    A = -layer.log_rate.T.exp()
    W, bias = layer.conv.weight, layer.conv.bias
    past = torch.cat((x.new_zeros(len(W) - 1, E), inner))
    for t in range(T):
        u = F.silu((past[t : t + len(W)] * W).sum(0) + bias)
        low, b, c = (u @ layer.select.weight.T).split((layer.rank, layer.states, layer.states))
        dt = F.softplus(low @ layer.step.weight.T + layer.step_bias)
        h = (dt[:, None] * A).exp() * h + dt[:, None] * b * u[:, None]
        outs.append((h @ c + layer.skip * u) * F.silu(z[t]))
    return torch.stack(outs) @ layer.out.weight.T


@pytest.mark.parametrize("settings", [{}, {"states": 5, "conv_size": 3, "rank": 2, "expand": 3}])
def test_it_is_the_papers_recurrence(settings: dict[str, int]) -> None:
    layer, (doc,) = build(**settings), documents(70)
    torch.testing.assert_close(alone(layer, doc), written_out(layer, doc), **TOL)


def test_it_starts_as_the_paper_says() -> None:
    layer = build(expand=8)
    dt = F.softplus(layer.step_bias)
    assert 1e-3 <= dt.min() and dt.max() <= 1e-1 and dt.max() / dt.min() > 20
    rates = layer.log_rate.exp()
    torch.testing.assert_close(rates, torch.arange(1.0, 17.0).double()[:, None].expand_as(rates))
    assert (layer.skip == 1).all() and layer.rank == 1
    assert layer.step.weight.abs().max() <= layer.rank**-0.5


def test_its_state_does_not_grow_and_keeps_nothing_else() -> None:
    layer = build()
    assert layer.state_bytes(3, 10) == layer.state_bytes(3, 10**6) == 3 * 32 * (16 + 3) * 8
    with torch.no_grad():
        state = layer.initial_state(1, 4)
        for t in range(40):
            x, layout = packed([[(0, documents(40)[0][t : t + 1], t)]])
            out = apply(layer, x, layout, state)
            state = out.state
            assert state.n_bytes() == layer.state_bytes(1, 4)
    torch.testing.assert_close(out.y[0], alone(layer, documents(40)[0])[-1:], **TOL)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_refused_guess_leaves_no_trace_whatever_it_held(value: float) -> None:
    layer, (doc,) = build(), documents(6)
    with torch.no_grad():
        guess = doc[:4].clone()
        guess[2:] = value
        layout = Layout.from_rows([[Doc(4, slot=0)]])
        state = apply(layer, guess[None], layout, layer.initial_state(1, 9), draft=True).state
        layout = Layout.from_rows([[Doc(4, slot=0, fresh=False, start=2)]])
        y = apply(layer, doc[None, 2:], layout, state.accept(torch.tensor([2]))).y[0]
    torch.testing.assert_close(y, alone(layer, doc)[2:], **TOL)


def test_it_learns_to_select() -> None:
    """Selective copying in small: the marked token, wherever it stood among the noise."""
    torch.manual_seed(0)
    layer = MIXERS.get("mamba")(states=4).build(D)
    head, table = torch.nn.Linear(D, 4), torch.nn.Embedding(9, D)
    init_weights(layer)
    parameters = [p for m in (layer, head, table) for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    g = torch.Generator().manual_seed(1)
    ctx, right = Ctx(Layout.plain(64, 12), Causal()), []
    for _ in range(150):
        ids = torch.randint(4, 8, (64, 12), generator=g)  # noise
        answer, at = (
            torch.randint(0, 4, (64,), generator=g),
            torch.randint(0, 8, (64,), generator=g),
        )
        ids[torch.arange(64), at], ids[:, -1] = answer, 8
        logits = head(layer(table(ids), ctx).y[:, -1])
        optimizer.zero_grad()
        F.cross_entropy(logits, answer).backward()
        optimizer.step()
        right.append((logits.argmax(-1) == answer).float().mean().item())
    assert sum(right[-10:]) / 10 > 0.95, "chance is 0.25"
