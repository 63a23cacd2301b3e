"""What keeps the state of linear attention from growing past the lengths of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import D, alone, documents
from torch import Tensor

from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.backbones.stack import StackConfig
from mm.model.context import Ctx
from mm.model.layer import Mixer, init_weights
from mm.model.mixers.linear_attention.capped_state import CappedStateConfig, capped_attention
from mm.model.mixers.linear_attention.linear_attention import LinearAttentionConfig
from mm.model.mixers.linear_attention.windowed_state import WindowedStateConfig

INNER = LinearAttentionConfig(heads=2, feature="silu", normalise=False, decay="scalar")


def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, cap: float) -> tuple[Tensor, ...]:
    """The recurrence as it is written."""
    outs = []
    for qt, kt, vt, gt in zip(*(x.unbind(1) for x in (q, k, v, g)), strict=True):
        S = gt.exp()[..., None, None] * S + kt[..., None] * vt[..., None, :]
        size = S.square().sum((-1, -2), keepdim=True).sqrt()
        S = torch.where(size > cap, S * cap / size, S)
        outs.append(torch.einsum("rhk,rhkv->rhv", qt, S))
    return torch.stack(outs, 1), S


@pytest.mark.parametrize("T", [1, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("cap", [0.7, 4.0, 1e6])
def test_the_capped_state_is_the_recurrence_in_all_gradients(T: int, cap: float) -> None:
    g = torch.Generator().manual_seed(T)
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)
    S = r(2, 2, 3, 4)
    S = 0.6 * S / S.square().sum((-1, -2), keepdim=True).sqrt()
    leaves = [r(2, T, 2, 3), r(2, T, 2, 3), r(2, T, 2, 4), -0.2 * r(2, T, 2).abs(), S]
    found = []
    real = torch.ones(2, T, 1)
    ours = lambda *x: capped_attention(*x[:3], real, *x[3:], cap=cap)
    for run in (ours, lambda *x: plain(*x, cap)):
        inputs = [x.clone().requires_grad_() for x in leaves]
        out = run(*inputs)
        found.append((*out, *torch.autograd.grad(sum(o.sin().sum() for o in out), inputs)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def norms(layer: Mixer, T: int) -> Tensor:
    """The largest norm of a head's state after 1, 2, 4, .. ``T`` tokens of noise."""
    torch.manual_seed(0)
    init_weights(layer)
    inner = getattr(layer, "inner", layer)
    init_weights(inner, 1)  # the same in a wrapper
    with torch.no_grad():
        inner.decay_bias.fill_(8.0)  # type: ignore[union-attr,operator]  # nothing is forgotten
        x, state, at, found = torch.randn(1, T, D), layer.initial_state(1, T), 0, []
        while at < T:
            n = max(at, 1)
            layout = Layout.from_rows([[Doc(n, slot=0, fresh=at == 0, start=at)]])
            state = layer(x[:, at : at + n], Ctx(layout, Causal()), state).state
            assert state is not None
            memory = next(m for m in state.leaves() if m.dim() == 4 and m.shape[1] == 2)
            found.append(memory.square().sum((-1, -2)).sqrt().max())
            at += n
    return torch.stack(found)


def test_states_stay_as_large_as_in_training_at_64_times_its_length() -> None:
    trained, T = 64, 4096
    free = norms(INNER.build(D), T)
    seen = float(free[: trained.bit_length()].max())
    assert free[-1] > 2.5 * seen, "the state of the mixer itself grows on"
    cap = seen * (1 + 5e-6)  # what rounding alone would cut
    held = norms(CappedStateConfig(inner=INNER, cap=cap).build(D), T)
    torch.testing.assert_close(held[: trained.bit_length()], free[: trained.bit_length()])
    assert held.max() <= seen * (1 + 1e-5)
    window = norms(WindowedStateConfig(inner=INNER, window=trained).build(D), T)
    assert window.max() <= 1.5 * seen
    more = INNER.model_copy(update={"temperature": 0.02, "insert": 0.9})
    assert norms(more.build(D), T)[-1] < seen


@pytest.mark.parametrize("decay", ["scalar", "step", "channel"])
def test_temperature_and_insert_are_powers_of_decays_and_factors_of_writes(decay: str) -> None:
    base = LinearAttentionConfig(heads=2, feature="silu", normalise=False, decay=decay)  # type: ignore[arg-type]
    layers = [base.build(D), base.model_copy(update={"temperature": 0.5, "insert": 0.3}).build(D)]
    init_weights(layers[0])
    layers[1].load_state_dict(layers[0].state_dict())
    (x,), ctx = documents(9), Ctx(Layout.plain(1, 9), Causal())
    f, more = (layer.double().features(x[None], ctx)[0] for layer in layers)
    torch.testing.assert_close(more["g"], 2 * f["g"])
    torch.testing.assert_close(more["v"], 0.3 * f["v"])
    torch.testing.assert_close(more["q"], f["q"])


def test_a_cap_that_is_never_reached_changes_nothing() -> None:
    layer = CappedStateConfig(inner=INNER, cap=1e9).build(D).double()
    init_weights(layer)
    (x,) = documents(100)
    torch.testing.assert_close(alone(layer, x), alone(layer.inner, x))


def test_only_mixers_with_a_decay_by_head_are_wrapped() -> None:
    for word in ("gla", "linear_attention", "attention"):
        with pytest.raises(UserError, match="decays by head"):
            CappedStateConfig(inner=StackConfig(pattern=word).mixer(word)).build(D)


# ---- trained: texts far longer than those of training ----

SYMBOLS, TRAINED = 12, 128


def shifting(rows: int, length: int, seed: int) -> Tensor:
    """`(rows, length)` symbols.

    Each is followed by its successor, which is drawn anew for every 128 tokens. A text of 128 gives
    no reason to forget, a longer one does.
    """
    g = torch.Generator().manual_seed(seed)
    out = torch.randint(SYMBOLS, (rows, length), generator=g)
    row = torch.arange(rows)
    for t in range(length - 1):
        if t % TRAINED == 0:
            follows = torch.rand(rows, SYMBOLS, SYMBOLS, generator=g).argsort(-1)[:, 0]
        known = torch.rand(rows, generator=g) < 0.9
        out[:, t + 1] = torch.where(known, follows[row, out[:, t]], out[:, t + 1])
    return out


def losses(parts: dict[str, Any], mixer: Mixer, x: Tensor) -> Tensor:
    """Nats `(length - 1,)` of each place, means over rows."""
    hidden = parts["embed"](x[:, :-1])
    ctx = Ctx(Layout.plain(x.shape[0], x.shape[1] - 1), Causal())
    logits = parts["head"](hidden + mixer(hidden, ctx).y)
    return F.cross_entropy(logits.mT, x[:, 1:], reduction="none").mean(0)


@pytest.mark.slow
def test_a_trained_mamba2_collapses_on_long_texts_and_a_window_of_states_mends_it() -> None:
    torch.manual_seed(0)
    config = INNER.model_copy(
        update={"decay": "step", "conv_size": 4, "value": "silu", "key_dim": 32, "norm": "full"}
    )
    mixer, width = config.build(32), 32
    init_weights(mixer)
    parts = {"embed": torch.nn.Embedding(SYMBOLS, width), "head": torch.nn.Linear(width, SYMBOLS)}
    every = [p for m in (mixer, *parts.values()) for p in m.parameters()]
    optimizer = torch.optim.AdamW(every, lr=5e-3)
    for step in range(400):
        loss = losses(parts, mixer, shifting(16, TRAINED, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = shifting(16, 2049, 10**6)
    window = WindowedStateConfig(inner=config, window=TRAINED // 2).build(32)
    window.inner.load_state_dict(mixer.state_dict())
    more = config.model_copy(update={"temperature": 0.2, "insert": 0.9}).build(32)
    more.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        # The second half of each 128 tokens: the successors have been seen by then.
        half = lambda m: losses(parts, m, x).view(-1, TRAINED)[:, TRAINED // 2 :].mean(-1)
        found = {"plain": half(mixer), "window": half(window), "forget more": half(more)}
    start, late = found["plain"][0], {n: v[8:].mean() for n, v in found.items()}
    assert start < 1.2, "it learned to recall within its length"
    # Seen with 500 steps: 0.59 at first, late 0.93; with a window 0.57, forgetting more 0.58.
    assert late["plain"] > start + 0.2, "and loses it far beyond"
    assert late["window"] < start + 0.1 and late["forget more"] < start + 0.1
