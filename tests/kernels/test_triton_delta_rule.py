"""The Triton kernels of the delta rule against the recurrence in float64.

They run interpreted, and are built for sm_90.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from triton_oracle import built, interpreted, recorded  # noqa: E402

from mm.kernels.delta_rule import delta_rule  # noqa: E402

NAMES = ("o", "last", "dq", "dk", "dv", "dbeta", "dg", "dinitial")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SCALE = 0.7


def arguments(
    dtype: torch.dtype,
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    strength: float | None = 1.0,
    largest: float = 1.0,
) -> list[Tensor | None]:
    """A call with unit keys, betas up to ``largest``, gates whose logits have this strength."""
    draw = torch.Generator().manual_seed(B + T + K)
    randn = lambda *shape: torch.randn(*shape, generator=draw)
    return [
        randn(B, T, H, K).to(dtype),
        F.normalize(randn(B, T, H, K), dim=-1).to(dtype),
        randn(B, T, H, V).to(dtype),
        largest * randn(B, T, H).sigmoid(),
        None if strength is None else F.logsigmoid(strength * randn(B, T, H)),
        randn(B, H, K, V),
    ]


def run(name: str, given: list[Tensor | None]) -> list[Tensor | None]:
    """Outputs, last state and all gradients of one implementation, of random sums of both."""
    given = [None if x is None else x.detach().requires_grad_() for x in given]
    with delta_rule.using(name):
        out = delta_rule(*given, SCALE)
    draw = torch.Generator().manual_seed(0)
    sums = [(x * torch.randn(x.shape, generator=draw).to(x)).sum() for x in out]
    (sums[0] + sums[1]).backward()
    return [*(x.detach() for x in out), *(None if x is None else x.grad for x in given)]


def agree(given: list[Tensor | None], bound: float, card: int = 90) -> None:
    """Each result within ``bound`` of the float64 recurrence, in root mean squares."""
    with interpreted(card):
        ours = run("triton", given)
    exact = run("reference", [None if x is None else x.double() for x in given])
    for name, x, y in zip(NAMES, ours, exact, strict=True):
        assert (x is None) == (y is None), name
        if x is not None and y is not None:
            assert torch.isfinite(x).all(), name
            error = (x.double() - y).square().mean().sqrt()
            assert error <= bound * y.square().mean().sqrt() + 1e-12, f"{name}: {error:.1e}"


@pytest.mark.parametrize("strength", [None, 1.0], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_two_chunks_with_states(strength: float | None, dtype: torch.dtype) -> None:
    agree(arguments(dtype, 1, 67, 2, 20, 12, strength), BOUND[dtype])


@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_weak_and_strong_gates(strength: float) -> None:
    given = arguments(torch.float32, 2, 70, 1, 17, 16, strength)
    if strength > 1:  # a wall, and gates that close wholly
        assert given[4] is not None
        given[4][:, 30] = -300.0
        given[4][:, 50:53] = -20.0
    agree(given, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [None, 1.0], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("card", [80, 86, 100])
def test_tiles_of_other_cards(card: int, dtype: torch.dtype, strength: float | None) -> None:
    agree(arguments(dtype, 1, 130, 1, 130, 130, strength), BOUND[dtype], card)


def test_negative_eigenvalues_of_keys_alike() -> None:
    """Betas near 2 and repeated keys: the system whose inverse is the hardest to form."""
    given = arguments(torch.float32, 1, 64, 1, 16, 16, 0.1, largest=2.0)
    k = given[1]
    assert k is not None
    k[:, 1::2] = k[:, ::2]
    agree(given, 1e-5)


@pytest.mark.parametrize("T", [1, 3])
def test_shorter_than_a_tile(T: int) -> None:
    agree(arguments(torch.float32, 2, T, 1, 3, 5), 1e-5)


def test_no_initial_state_and_no_gradient_of_the_last_one() -> None:
    given = arguments(torch.float32, 1, 65, 1, 16, 16)
    given[5] = None
    v = given[2]
    assert v is not None
    v.requires_grad_()
    with interpreted(), delta_rule.using("triton"):
        (dv,) = torch.autograd.grad(delta_rule(*given)[0].sum(), v)
    with delta_rule.using("reference"):
        (expected,) = torch.autograd.grad(delta_rule(*given)[0].sum(), v)
    torch.testing.assert_close(dv, expected)


def test_shapes_of_the_operator_when_traced() -> None:
    given = [
        None if x is None else x.requires_grad_() for x in arguments(torch.float32, 1, 3, 1, 2, 2)
    ]
    with interpreted():
        torch.library.opcheck(
            torch.ops.mm.delta_rule_triton,
            (*given, SCALE),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.slow
@pytest.mark.parametrize("strength", [None, 1.0], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("T,K,V", [(64, 60, 130), (130, 130, 60), (200, 64, 128)])
def test_wide_heads_take_several_tiles(
    strength: float | None, dtype: torch.dtype, T: int, K: int, V: int
) -> None:
    agree(arguments(dtype, 1, T, 1, K, V, strength), BOUND[dtype])


def hopper(D: int, gated: bool) -> None:
    """Build all kernels of a call for sm_90 and read the binaries."""
    B, T, H = 1, 8192, 16
    q, k, v = (torch.empty(B, T, H, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    beta = torch.empty(B, T, H)
    with recorded() as launches, delta_rule.using("triton"):
        o, _ = delta_rule(q, k, v, beta, beta if gated else None, torch.empty(B, H, D, D))
        o.backward(torch.empty_like(o))
    kernels = {x.kernel.__name__: x for x in launches}  # some run in both directions
    kernels.pop("_sum_parts", None)  # it multiplies nothing
    assert len(kernels) == 9
    for launch in kernels.values():
        binary = built(launch).check(dot=True)
        assert binary.wgmma > 0, binary


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("D", [64, 128])
def test_every_binary_for_hopper(D: int, gated: bool) -> None:
    hopper(D, gated)
