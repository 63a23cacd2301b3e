"""The chunked form of linear attention equals its recurrence, in outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check, dtypes, randn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mm.kernels.linear_attention import (
    _backward,
    _empties,
    _forward,
    linear_attention,
)

DECAYS = ("none", "constant", "scalar", "channel")

# The Triton form runs interpreted (tests/kernels/test_triton_linear_attention.py).
HERE = [name for name in linear_attention.implementations if name != "triton"]


def inputs(
    decay: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    strength: float = 1.0,
    initial: bool = True,
) -> tuple[Tensor | None, ...]:
    shape = {"none": None, "constant": (H,), "scalar": (B, T, H), "channel": (B, T, H, K)}[decay]
    g = -strength * randn(*shape, seed=4).abs() if shape is not None else None
    return (
        randn(B, T, H, K, dtype=dtype),
        randn(B, T, H, K, dtype=dtype, seed=1),
        randn(B, T, H, V, dtype=dtype, seed=2),
        g.to(dtype) if g is not None else None,
        randn(B, H, K, V, dtype=dtype, seed=3) if initial else None,
    )


@dtypes
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    "B,T,H,K,V",
    [
        (1, 1, 1, 1, 1),
        (2, 3, 2, 5, 4),
        (1, 63, 2, 8, 3),
        (2, 64, 1, 4, 4),
        (1, 65, 2, 6, 7),
        (2, 130, 2, 5, 3),
        (2, 0, 1, 3, 2),
        (0, 4, 1, 3, 2),
    ],
)
@pytest.mark.parametrize("initial", [False, True])
def test_chunked_equals_the_recurrence(
    dtype: torch.dtype, decay: str, B: int, T: int, H: int, K: int, V: int, initial: bool
) -> None:
    arguments = inputs(decay, dtype, B, T, H, K, V, 0.3, initial)
    scaled = tuple(a * 0.3 if a is not None and i < 2 else a for i, a in enumerate(arguments))
    check(linear_attention, "chunked", scaled, dtype)


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_many_blocks_of_chunks(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.kernels.linear_attention.IN_HAND", 1)
    check(
        linear_attention,
        "chunked",
        inputs(decay, torch.float64, 2, 300, 2, 4, 3, 0.1),
        torch.float64,
    )


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("strength", [1e-4, 1.0, 4.0, 30.0, 1e4])
def test_no_decay_is_too_strong_or_too_weak(decay: str, strength: float) -> None:
    """exp(30 * 64) is no float32: a form that divides by cumulative decays would overflow."""
    arguments = inputs(decay, torch.float64, 1, 130, 2, 4, 3, strength)
    check(linear_attention, "chunked", arguments, torch.float64)
    narrow = [a.detach().float() if a is not None else None for a in arguments]
    got, final = linear_attention(*narrow)
    with linear_attention.using("reference"):
        expected, last = linear_attention(*arguments)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final.double(), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.1, 30.0])
def test_a_decay_by_channel_without_a_question(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device is not asked how strong its decays are: pairs are scored as for the strongest."""
    monkeypatch.setattr("mm.kernels.linear_attention.ASKED", ())
    arguments = inputs("channel", torch.float64, 2, 130, 2, 4, 3, strength)
    check(linear_attention, "chunked", arguments, torch.float64)


def test_a_row_of_strong_decay_moves_no_bit_of_another() -> None:
    """How many places are scored at once depends on a row's own decay, gradients included."""
    weak = inputs("channel", torch.float64, 3, 130, 2, 4, 3, 0.1)
    check(linear_attention, "chunked", (*weak[:3], _stronger(weak[3]), weak[4]), torch.float64)
    narrow = [a.detach().float().requires_grad_() for a in weak if a is not None]

    def results(g: Tensor) -> list[Tensor]:
        o, final = linear_attention(*narrow[:3], g, narrow[4])
        grads = torch.autograd.grad(o.square().sum() + final.sum(), [*narrow[:3], g, narrow[4]])
        return [x[[0, 2]] for x in (o, final, *grads)]

    for a, b in zip(results(narrow[3]), results(_stronger(narrow[3])), strict=True):
        assert torch.equal(a, b)


def _stronger(g: Tensor | None) -> Tensor:
    """The second row's decay, a hundredfold."""
    assert g is not None
    return (
        g.detach() * torch.tensor([1, 100, 1], dtype=g.dtype)[:, None, None, None]
    ).requires_grad_()


@pytest.mark.parametrize("decay", DECAYS)
def test_the_state_carries_over_any_border(decay: str) -> None:
    q, k, v, g, initial = inputs(decay, torch.float64, 2, 150, 2, 4, 3, 0.1)
    whole, last = linear_attention(q, k, v, g, initial)
    cut = lambda a, b: (
        *(x[:, a:b] for x in (q, k, v)),
        g[:, a:b] if g is not None and g.dim() > 1 else g,
    )
    outs, state = [], initial
    for a, b in ((0, 1), (1, 70), (70, 70), (70, 134), (134, 150)):
        o, state = linear_attention(*cut(a, b), state)
        outs.append(o)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HERE)
def test_reference_is_the_masked_product(name: str) -> None:
    """Against the parallel form, which neither implementation computes: (Q K^T * D) V."""
    q, k, v, g, _ = inputs("channel", torch.float64, 1, 9, 2, 4, 3, initial=False)
    log = g.cumsum(1)
    decay = (log[:, :, None] - log[:, None]).exp()  # (B, T, T, H, K)
    matrix = torch.einsum("bthk,bshk,btshk->bhts", q, k, decay).tril()
    with linear_attention.using(name):
        o, _ = linear_attention(q, k, v, g)
    torch.testing.assert_close(o, torch.einsum("bhts,bshv->bthv", matrix, v))


def test_narrow_types_and_strides() -> None:
    q, k, v, g, _ = inputs("scalar", torch.bfloat16, 2, 70, 2, 4, 4, 0.1, initial=False)
    o, final = linear_attention(q, k, v, g)
    assert o.dtype == final.dtype == torch.float32
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, g)]
    torch.testing.assert_close(linear_attention(*turned)[0], o.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("decay", DECAYS)
def test_cost_grows_linearly(decay: str) -> None:
    """Multiplications counted, not seconds: 4x the tokens cost 4x the work in both directions."""

    def flops(T: int) -> int:
        q, k, v, g, initial = inputs(decay, torch.float32, 1, T, 2, 8, 8, 0.1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            given = (q, k, v, g, initial)
            o, final, states = outs = _empties(*given)
            _forward(*given, *outs)
            grads = [q.new_empty(0 if x is None else x.shape) for x in given]
            _backward(q, k, v, g, states, initial, o, final, *grads)
        return counter.get_total_flops()

    assert flops(4096) == 4 * flops(1024) > 0
