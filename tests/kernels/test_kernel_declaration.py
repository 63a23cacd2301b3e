"""One declaration makes an op: its schema, gradients, what it saves and how it takes arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.linear_scan import linear_scan
from mm.kernels.op import Op


@pytest.fixture(scope="module")
def scaled() -> Op:
    """``x * scale + shift``, whose gradients come from what is filled in."""
    before = dict(Op.every)

    @Op
    def toy_scaled(x_RD: Tensor, shift_D: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y = x_RD * scale
        return y if shift_D is None else y + shift_D

    def forward(x: Tensor, shift: Tensor | None, scale: float, y: Tensor) -> None:
        assert x.is_contiguous()
        torch.mul(x, scale, out=y)
        if shift is not None:
            y += shift

    def backward(
        shift: Tensor | None, scale: float, dy: Tensor, dx: Tensor, dshift: Tensor
    ) -> None:
        torch.mul(dy, scale, out=dx)
        assert dshift.numel() == (0 if shift is None else shift.numel())
        if shift is not None:
            dshift.copy_(dy.sum(0))

    register_kernel(
        toy_scaled,
        "y",
        lambda x, shift, scale: x.new_empty(x.shape),
        saved="shift scale",
        gradients="x:dy shift",
        plain={"filled": (forward, backward)},
    )
    Op.every.clear()
    Op.every.update(before)  # the laws list what is registered
    return toy_scaled


@pytest.mark.parametrize("shifted", [False, True])
def test_outputs_and_gradients_are_the_references(scaled: Op, shifted: bool) -> None:
    x = torch.randn(3, 4).T.requires_grad_()  # made contiguous for the kernel
    shift = torch.randn(3, requires_grad=True) if shifted else None
    leaves = [x, *([] if shift is None else [shift])]
    found = []
    for name in ("reference", "filled"):
        with scaled.using(name):
            y = scaled(x, shift, scale=3.0)
        found.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_arguments_are_the_references(scaled: Op) -> None:
    x = torch.randn(2, 3)
    with scaled.using("filled"):
        assert torch.equal(scaled(x, scale=2.0), 2 * x)
        with pytest.raises(TypeError, match="slope"):
            scaled(x, slope=2.0)
        with pytest.raises(TypeError, match="x_RD"):
            scaled()


def test_schema_fake_and_autograd_of_the_op(scaled: Op) -> None:
    op = torch.ops.mm.toy_scaled_filled
    assert str(op.default._schema).endswith("(Tensor x, Tensor? shift, float scale) -> Tensor")
    given = (torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True), 2.0)
    torch.library.opcheck(op, given)


def test_what_is_saved_depends_on_the_setting() -> None:
    """A scan keeps its inputs for the backward of logarithms alone."""
    a, b = (torch.rand(1, 5, 3, requires_grad=True) for _ in "ab")

    def saved(log: bool) -> int:
        held: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: held.append(x.data_ptr()) or x, lambda x: x
        )
        with linear_scan.using("loop"), hooks:
            linear_scan(a, b, log=log)
        return sum(p == b.data_ptr() for p in held)

    assert (saved(False), saved(True)) == (0, 1)
