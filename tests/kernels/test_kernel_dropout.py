"""Dropout from given draws: the C++ path equals the reference bit by bit; share and mean hold."""

from __future__ import annotations

import pytest
import torch

from mm.kernels.dropout import LEVELS, dropout

DRAWS = torch.randint(-32768, 32768, (70_000,), generator=torch.Generator().manual_seed(0)).short()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (0, 4), (3, 5, 33), (64, 1000)])
@pytest.mark.parametrize("lost", [0, 1, 6554, LEVELS - 1])
def test_cpp_is_the_reference(dtype: torch.dtype, shape: tuple[int, ...], lost: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    given, found = torch.ones_like(x) * 0.3, []
    for name in ("reference", "cpp"):
        leaf = x.clone().requires_grad_()
        with dropout.using(name):
            y = dropout(leaf, DRAWS, lost)
        y.backward(given)
        found.append((y, leaf.grad))
    (y, dx), (y_cpp, dx_cpp) = found
    assert y_cpp.dtype == dtype and torch.equal(y, y_cpp) and torch.equal(dx, dx_cpp)


def test_share_and_mean() -> None:
    y = dropout(torch.ones(64, 1000), DRAWS, 6554)
    share, kept = (y == 0).double().mean().item(), 1 - 6554 / LEVELS
    assert abs(share - 0.1) < 0.005
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / kept]))
