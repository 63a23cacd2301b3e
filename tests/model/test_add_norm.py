"""Blocks whose sum and norm are one kernel equal those whose are two. T tokens, D model."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_checks import check, dtypes, randn
from triton_oracle import interpreted

from mm import config as yaml_config
from mm.kernels.attention import attention
from mm.kernels.rms_norm import add_rms_norm, add_triton
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model import recompute
from mm.model.context import Ctx
from mm.model.layer import Block, init_weights
from mm.registry import BLOCKS, FFNS, MIXERS

D, T = 12, 9
LAYOUT = Layout.from_rows([[Doc(4), Doc(5)], [Doc(7)]], T)


def build(value: Any) -> Block:
    torch.manual_seed(0)
    mixer = cast(Any, MIXERS.parse({"kind": "attention", "heads": 2})).build(D)
    ffn = cast(Any, FFNS.parse({"kind": "swiglu", "hidden": 10})).build(D)
    block = cast(Any, BLOCKS.parse(value)).build(D, mixer, ffn)
    init_weights(block)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return block


def results(block: Block, mode: str, autocast: bool) -> list[Tensor]:
    """Output, and gradients of input and parameters, of a pass in training with dropout."""
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ctx = Ctx(LAYOUT, Causal(), seed=3)
    with interpreted(), attention.using("reference"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = block(x, ctx) if mode == "none" else recompute.run(mode, block, x, ctx)
        weights = torch.arange(out.y.numel()).sin().view(out.y.shape)
        leaves = [x, *block.parameters()]
        return [out.y, *torch.autograd.grad((out.y * weights).sum(), leaves)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the fused kernels are asked for."""
    seen: list[str] = []
    for name in ("forward", "backward"):

        def run(*given: Any, name: str = name, real: Any = getattr(add_triton, name)) -> None:
            seen.append(name)
            real(*given)

        monkeypatch.setattr(add_triton, name, run)
    return seen


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "prenorm", "dropout": 0.3},
        {"kind": "prenorm", "norm": "zero_centred"},
        {"kind": "prenorm", "normed_residual": True},
        {"kind": "gated"},
        yaml_config.read("block/sandwich"),
        {"kind": "layer_drop", "rate": 0.3},
    ],
    ids=["prenorm", "zero_centred", "normed_residual", "gated", "sandwich", "layer_drop"],
)
def test_a_block_gives_what_it_gave(value: Any, calls: list[str]) -> None:
    """Also when its results are made again for the backward, bit for bit."""
    block = build(value)
    with add_rms_norm.using("apart"):
        apart = results(block, "none", autocast=False)
    assert not calls
    fused = results(block, "none", autocast=False)
    assert calls == ["forward", "backward"]
    for expected, got in zip(apart, fused, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for mode in ("selective", "full"):
        for expected, got in zip(fused, results(block, mode, autocast=False), strict=True):
            assert torch.equal(got, expected)


def test_a_block_under_autocast_gives_what_it_gave(calls: list[str]) -> None:
    """A float32 stream, branches in bf16: same dtypes, the difference within bf16's rounding."""
    block = build("prenorm")
    with add_rms_norm.using("apart"):
        apart = results(block, "none", autocast=True)
    fused = results(block, "none", autocast=True)
    assert calls == ["forward", "backward"]
    for expected, got in zip(apart, fused, strict=True):
        assert got.dtype == expected.dtype == torch.float32
        error = (got - expected).detach().norm() / expected.detach().norm()
        assert error < 2e-3


@pytest.mark.parametrize("value", [{"kind": "prenorm", "norm": "layer"}, "parallel"])
def test_other_blocks_know_nothing_of_it(value: Any, calls: list[str]) -> None:
    results(build(value), "none", autocast=False)
    assert not calls


@dtypes
@pytest.mark.parametrize("branch", [(2, 1, 60), (60,)], ids=["alike", "broadcast"])
def test_two_ops_are_the_equation(dtype: torch.dtype, branch: tuple[int, ...]) -> None:
    given = randn(2, 1, 60, dtype=dtype), randn(*branch, dtype=dtype, seed=1)
    check(add_rms_norm, "apart", (*given, randn(60, dtype=dtype, seed=2)), dtype)


def test_what_the_kernel_refuses_is_done_apart() -> None:
    x, wide = torch.randn(3, 4).bfloat16(), torch.randn(3, 4)
    with interpreted():
        assert add_rms_norm.pick(x, x) == add_rms_norm.pick(wide, x) == "triton"
        for given in ((x, wide), (wide, wide[0]), (wide.double(), wide), (x.half(), x)):
            assert add_rms_norm.pick(*given) == "apart"
            total, y = add_rms_norm(*given)
            assert total.dtype == y.dtype == torch.promote_types(given[0].dtype, given[1].dtype)
