"""Looped depth against a plain stack, and halting against its formulas. B rows, T tokens."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.registry import BACKBONES

D, T = 16, 7
LAYOUT = Layout.from_rows([[Doc(4), Doc(2)]], T)  # the last is padding
X = torch.randn(1, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(kind: str = "looped", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = cast(Any, BACKBONES.get(kind))(
        pattern="attention rg_lru",
        mixers={"attention": {"heads": 2}, "rg_lru": {"heads": 2}},
        **settings,
    )
    made = config.build(D)
    init_weights(made)
    return made.double()


def test_without_halting_it_is_the_path_of_a_stack() -> None:
    looped, plain = build(loops=3), build("stack")
    plain.load_state_dict(looped.state_dict())
    ctx = Ctx(LAYOUT, Causal())
    assert torch.equal(looped(X, ctx).y, plain(X, ctx, None, [0, 1] * 3).y)
    assert len(looped.initial_state(1, 8)) == 6, "every visit has a State"


def by_hand(stack: Any, halting: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answers, rounds and last shares of every token, token by token where the text says so."""
    x, ctx = X, Ctx(LAYOUT, Causal())
    h = torch.zeros(T, dtype=torch.float64)
    answer, rounds, rest = torch.zeros_like(X), torch.zeros(T), torch.zeros(T)
    done = torch.zeros(T, dtype=torch.bool)
    for n in range(1, stack.loops + 1):
        y = x
        for layer in stack.layers:
            y = layer(y, ctx).y
        share = (y @ stack.halt_weight + stack.halt_bias).sigmoid()[0]
        for t in range(T):
            if done[t]:
                continue
            rounds[t] = n
            if h[t] + share[t] >= 1 - halting or n == stack.loops:
                rest[t], done[t] = 1 - h[t], True
                answer[0, t] += y[0, t] * (1 - h[t])
            else:
                answer[0, t] += y[0, t] * share[t]
                h[t] = h[t] + share[t]
        stay = torch.tensor([bool(done[t]) and rounds[t] < n for t in range(T)])
        x = torch.where(stay[None, :, None], x, y)
    return answer, rounds, rest


@pytest.mark.parametrize("bias", [-3.0, 0.0, 0.5, 9.0])
def test_halting_is_its_formulas(bias: float) -> None:
    stack = build(loops=4, halting=0.01)
    with torch.no_grad():
        stack.halt_weight.normal_(std=0.7, generator=torch.Generator().manual_seed(2))
        stack.halt_bias.fill_(bias)
        out = stack(X, Ctx(LAYOUT, Causal()))
        answer, rounds, rest = by_hand(stack, 0.01)
        torch.testing.assert_close(out.y, stack.norm(answer))
    ponder = out.aux["ponder"]
    assert ponder.count == 6 and float(ponder.total) == pytest.approx(
        float((rounds + rest)[:6].sum())
    )
    assert rounds.max() <= 4 and (bias != 9.0 or rounds.max() == 1)


def test_fewer_rounds_lower_the_loss_of_pondering() -> None:
    stack = build(loops=4, halting=0.01)
    with torch.no_grad():
        stack.halt_weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    stack(X, Ctx(LAYOUT, Causal())).aux["ponder"].total.backward()
    assert float(stack.halt_bias.grad) < 0, "a larger bias halts sooner"


def test_every_round_has_the_same_share_at_first() -> None:
    stack = build(loops=5, halting=0.01)
    torch.testing.assert_close(stack.halt_bias.sigmoid().item(), 0.2)
