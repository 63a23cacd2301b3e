"""The chunk form of the delta rule equals the recurrence, and the recurrence does what it says."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import TOL, check, dtypes, others, randn
from torch import Tensor

from mm.kernels.delta_rule import delta_rule

DECAYS = {
    "none": lambda x: None,
    "weak": lambda x: F.logsigmoid(x + 5),
    "scattered": lambda x: F.logsigmoid(10 * x),
    "zero": torch.zeros_like,
    "strong": lambda x: torch.full_like(x, -20.0),
    "a wall, then weak": lambda x: (
        torch.where(torch.arange(x.shape[1])[:, None] == 1, -3e4, -0.01) * torch.ones_like(x)
    ),
}

# The Triton form runs interpreted (tests/kernels/test_triton_delta_rule.py).
HERE = [name for name in delta_rule.implementations if name != "triton"]


def arguments(
    B: int, T: int, H: int, K: int, V: int, decay: str, initial: bool, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """A call with unit keys and strengths all over (0, 2)."""
    g = DECAYS[decay](randn(B, T, H, seed=4).detach())
    made = (
        randn(B, T, H, K),
        F.normalize(randn(B, T, H, K, seed=1), dim=-1),
        randn(B, T, H, V, seed=2),
        2 * randn(B, T, H, seed=3).mul(2).sigmoid(),
        g,
        randn(B, H, K, V, seed=5) if initial else None,
    )
    return tuple(x if x is None else x.detach().to(dtype) for x in made)


@dtypes
@pytest.mark.parametrize("name", others(delta_rule))
@pytest.mark.parametrize(
    "B,T,H,K,V",
    [
        (1, 1, 1, 1, 1),
        (2, 3, 2, 5, 3),
        (1, 17, 2, 4, 4),
        (1, 63, 1, 12, 20),
        (2, 64, 2, 16, 8),
        (1, 65, 3, 7, 9),
        (2, 130, 1, 20, 12),
        (2, 0, 2, 3, 4),
        (0, 4, 2, 3, 4),
    ],
)
@pytest.mark.parametrize("decay", ["none", "weak", "scattered"])
@pytest.mark.parametrize("initial", [False, True], ids=["fresh", "initial"])
def test_chunks_equal_the_recurrence(
    name: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    decay: str,
    initial: bool,
) -> None:
    args = arguments(B, T, H, K, V, decay, initial, dtype)
    check(delta_rule, name, args, dtype, scale=0.3)


@pytest.mark.parametrize("name", others(delta_rule))
@pytest.mark.parametrize("decay", ["zero", "strong", "a wall, then weak"])
def test_extreme_decays(name: str, decay: str) -> None:
    check(delta_rule, name, arguments(1, 130, 2, 16, 16, decay, True, torch.float64), torch.float64)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("decay", DECAYS)
def test_float32_loses_little(name: str, decay: str) -> None:
    """Error over size, each in the mean square.

    After a wall the sums of log decays are large, but the decays still differ in their fifth digit.
    """

    def run(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        args = arguments(1, 130, 2, 16, 16, decay, True, torch.float32)
        args = tuple(x if x is None else x.to(dtype).requires_grad_() for x in args)
        with delta_rule.using(implementation):
            outs = delta_rule(*args)  # type: ignore[arg-type]
        loss = sum((o * randn(*o.shape, seed=9).detach()).sum() for o in outs)
        grads = torch.autograd.grad(loss, [x for x in args if x is not None])
        return [x.detach().double() for x in (*outs, *grads)]

    for got, expected in zip(
        run(name, torch.float32), run("reference", torch.float64), strict=True
    ):
        assert (got - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("name", others(delta_rule))
def test_reflections_of_like_keys_stay_accurate(name: str) -> None:
    """The worst case of the triangular system: strengths of almost 2 and keys almost alike.

    One substitution over the whole chunk would be ten times worse than blocks are.
    """
    q, k, v, _, _, s = arguments(1, 256, 1, 16, 16, "none", True, torch.float32)
    assert q is not None and k is not None and v is not None and s is not None
    k = F.normalize(k[:, :1] + 0.05 * k, dim=-1)
    beta = torch.full((1, 256, 1), 1.999)
    with delta_rule.using("reference"):
        expected = delta_rule(*(x.double() for x in (q, k, v, beta)), None, s.double())
    with delta_rule.using(name):
        got = delta_rule(q, k, v, beta, None, s)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() < 5e-5 * b.norm()


@pytest.mark.parametrize("name", HERE)
def test_any_strides_and_narrow_types(name: str) -> None:
    q, k, v, beta, g, s = arguments(2, 70, 2, 8, 4, "weak", True, torch.float64)
    assert q is not None and k is not None and v is not None
    wide = torch.cat((q, k, v), dim=-1)
    with delta_rule.using("reference"):
        expected = delta_rule(q, k, v, beta, g, s)
    with delta_rule.using(name):
        got = delta_rule(*wide.split((8, 8, 4), dim=-1), beta, g, s)
        o, last = delta_rule(q.bfloat16(), k.bfloat16(), v.bfloat16(), beta, g, s)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **TOL[torch.float64])
    assert o.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert (o - expected[0]).abs().max() < 0.03 * expected[0].abs().max()


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("decay", ["none", "weak"])
def test_state_out_is_state_in(name: str, decay: str) -> None:
    """Pieces of any length, a single token among them, equal the whole."""
    q, k, v, beta, g, s = arguments(2, 140, 2, 6, 10, decay, True, torch.float64)
    with delta_rule.using(name):
        expected, last = delta_rule(q, k, v, beta, g, s)
        got = []
        for at, stop in ((0, 1), (1, 67), (67, 67), (67, 70), (70, 140)):
            cut = [None if x is None else x[:, at:stop] for x in (q, k, v, beta, g)]
            o, s = delta_rule(*cut, s)
            got.append(o)
    torch.testing.assert_close(torch.cat(got, 1), expected, **TOL[torch.float64])
    torch.testing.assert_close(s, last, **TOL[torch.float64])


@pytest.mark.parametrize("name", HERE)
def test_a_place_without_strength_and_decay_changes_no_state(name: str) -> None:
    q, k, v, beta, g, s = arguments(1, 9, 2, 4, 4, "weak", True, torch.float64)
    assert beta is not None and g is not None and s is not None
    with delta_rule.using(name):
        last = delta_rule(q, k, v, beta * 0, g * 0, s)[1]
    assert torch.equal(last, s)


@pytest.mark.parametrize("name", HERE)
def test_full_strength_writes_and_overwrites_orthonormal_keys_exactly(name: str) -> None:
    K = V = 16
    keys = torch.linalg.qr(randn(K, K).detach())[0]
    values, later = randn(K, V, seed=1).detach(), randn(K, V, seed=2).detach()
    again = torch.tensor([3, 3, 11, 0])
    k = torch.cat((keys, keys[again]))[None, :, None]
    v = torch.cat((values, later[:4]))[None, :, None]
    with delta_rule.using(name):
        S = delta_rule(k, k, v, torch.ones(1, K + 4, 1, dtype=torch.float64))[1][0, 0]
    expected = values.clone()
    for i, key in enumerate(again):
        expected[key] = later[i]
    torch.testing.assert_close(keys @ S, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", HERE)
def test_strength_two_reflects_and_so_tracks_parity(name: str) -> None:
    """Reflecting once for every 1 gives the parity of all bits, at any length.

    Strengths up to 1 leave the sign as it is.
    """
    bits = torch.randint(2, (1, 500, 1), generator=torch.Generator().manual_seed(0))
    key = torch.ones(1, 500, 1, 1)
    start = torch.ones(1, 1, 1, 1)
    with delta_rule.using(name):
        o = delta_rule(key, key, 0 * key, 2.0 * bits, None, start)[0]
        weak = delta_rule(key, key, 0 * key, 0.5 * bits, None, start)[0]
    assert torch.equal(o[..., 0], 1.0 - 2 * (bits.cumsum(1) % 2))
    assert (weak >= 0).all()


@pytest.mark.parametrize("name", others(delta_rule))
def test_time_grows_with_the_length_not_its_square(name: str) -> None:
    def seconds(T: int) -> float:
        args: list[Any] = list(arguments(1, T, 1, 16, 16, "weak", False, torch.float32))
        leaves = [x.requires_grad_() for x in args if x is not None]
        best = math.inf
        for _ in range(3):
            before = time.process_time()
            with delta_rule.using(name):
                torch.autograd.grad(delta_rule(*args)[0].sum(), leaves)
            best = min(best, time.process_time() - before)
        return best

    seconds(64)
    assert seconds(16384) < 16 * seconds(2048), "8 times the tokens"
