"""The Triton kernels of linear attention against the recurrence in float64.

They run interpreted, and are built for sm_90.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from triton_oracle import built, interpreted, recorded  # noqa: E402

from mm.kernels.linear_attention import linear_attention  # noqa: E402

DECAYS = ("none", "constant", "scalar", "channel")
NAMES = ("o", "last", "dq", "dk", "dv", "dg", "dinitial")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def arguments(
    decay: str, dtype: torch.dtype, B: int, T: int, H: int, K: int, V: int, strength: float = 1.0
) -> list[Tensor | None]:
    """A call whose gates are logits of this strength; decays are float32, as mixers make them."""
    draw = torch.Generator().manual_seed(B + T + K)
    randn = lambda *shape: torch.randn(*shape, generator=draw)
    shape = {"none": None, "constant": (H,), "scalar": (B, T, H), "channel": (B, T, H, K)}[decay]
    return [
        (0.3 * randn(B, T, H, K)).to(dtype),
        (0.3 * randn(B, T, H, K)).to(dtype),
        randn(B, T, H, V).to(dtype),
        None if shape is None else F.logsigmoid(strength * randn(*shape)),
        randn(B, H, K, V),
    ]


def run(name: str, given: list[Tensor | None]) -> list[Tensor | None]:
    """Outputs, last state and all gradients of one implementation, of random sums of both."""
    given = [None if x is None else x.detach().requires_grad_() for x in given]
    with linear_attention.using(name):
        out = linear_attention(*given)
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


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_two_chunks_with_states(decay: str, dtype: torch.dtype) -> None:
    agree(arguments(decay, dtype, 1, 67, 2, 20, 12), BOUND[dtype])


@pytest.mark.parametrize("decay", DECAYS[2:])
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_weak_and_strong_gates(decay: str, strength: float) -> None:
    given = arguments(decay, torch.float32, 2, 70, 1, 17, 16, strength)
    if strength > 1:  # a wall, and gates that close wholly
        assert given[3] is not None
        given[3][:, 30] = -300.0
        given[3][:, 50:53] = -20.0
    agree(given, 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 3])
def test_shorter_than_a_tile(decay: str, T: int) -> None:
    agree(arguments(decay, torch.float32, 2, T, 1, 3, 5), 1e-5)


def test_no_initial_state_and_no_gradient_of_the_last_one() -> None:
    given = arguments("scalar", torch.float32, 1, 65, 1, 16, 16)
    given[4] = None
    agree(given, 1e-5)
    with interpreted(), linear_attention.using("triton"):
        v = given[2].requires_grad_()  # type: ignore[union-attr]
        (dv,) = torch.autograd.grad(linear_attention(*given)[0].sum(), v)
    with linear_attention.using("reference"):
        (expected,) = torch.autograd.grad(linear_attention(*given)[0].sum(), v)
    torch.testing.assert_close(dv, expected)


def test_an_outside_call_stays_on_the_cpu_path() -> None:
    assert linear_attention.pick(*arguments("none", torch.float32, 1, 3, 1, 2, 2)) == "chunked"


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("T,K,V", [(64, 60, 130), (130, 130, 60), (200, 64, 128)])
def test_wide_heads_take_several_tiles(
    decay: str, dtype: torch.dtype, T: int, K: int, V: int
) -> None:
    agree(arguments(decay, dtype, 1, T, 1, K, V), BOUND[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("card", [80, 86, 100])
def test_tiles_of_other_cards(card: int, dtype: torch.dtype, decay: str) -> None:
    agree(arguments(decay, dtype, 1, 130, 2, 130, 130), BOUND[dtype], card)


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_traces(decay: str) -> None:
    """Shapes and dtypes of the fake operators are those of the real ones."""
    given = [
        x if x is None else x.requires_grad_()
        for x in arguments(decay, torch.float32, 1, 3, 1, 2, 2)
    ]
    with interpreted():
        torch.library.opcheck(
            torch.ops.mm.linear_attention_triton,
            given,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def hopper(decay: str, D: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Build all kernels of a call for sm_90 and read the binaries."""
    B, T, H = 1, 8192, 16
    shape = {"none": None, "constant": (H,), "scalar": (B, T, H), "channel": (B, T, H, D)}[decay]
    q, k, v = (torch.empty(B, T, H, D, dtype=dtype, requires_grad=True) for _ in range(3))
    g = None if shape is None else torch.empty(shape)
    with recorded() as launches, linear_attention.using("triton"):
        o, _ = linear_attention(q, k, v, g, torch.empty(B, H, D, D))
        o.backward(torch.empty_like(o))
    kernels = {launch.kernel.__name__: launch for launch in launches}  # the backward's again
    kernels.pop("_sum_parts", None)  # it multiplies nothing
    assert len(kernels) == 5 + 2 * (decay == "channel")
    for launch in kernels.values():
        binary = built(launch).check(dot=True)
        assert binary.wgmma > 0, binary


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("D", [64, 128])
def test_every_binary_for_hopper(decay: str, D: int) -> None:
    hopper(decay, D)
