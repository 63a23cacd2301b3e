"""The self-check: a wrong implementation is found on its first call, named, and not used."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from mm.kernels import check
from mm.kernels.op import Op


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_SELF_CHECK", "1")
    monkeypatch.setattr(Op, "every", dict(Op.every))  # the laws list what is registered


def toy() -> Op:
    @Op
    def scaled(x_BTD: Tensor, w_D: Tensor, length_B: Tensor | None = None) -> Tensor:
        return x_BTD * w_D

    return scaled


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, 2 * (grad * x).sum((0, 1))


def test_a_wrong_one_is_replaced_by_the_next_and_named(caplog: pytest.LogCaptureFixture) -> None:
    op, calls = toy(), []

    @op.register("right", lambda *a: None)
    def _(x_BTD: Tensor, w_D: Tensor) -> Tensor:
        calls.append(x_BTD.shape)
        return w_D * x_BTD

    @op.register("raises", lambda *a: None)
    def _(x_BTD: Tensor, w_D: Tensor) -> Tensor:
        raise RuntimeError("out of shared memory")

    @op.register("wrong", lambda *a: None)
    def _(x_BTD: Tensor, w_D: Tensor) -> Tensor:
        return x_BTD * w_D + 0.01

    x, w = torch.randn(5, 300, 4), torch.randn(4)
    with caplog.at_level("WARNING", "mm.kernels"):
        for _ in range(3):
            assert torch.equal(op(x, w), x * w)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and said[0].startswith("scaled: wrong IS WRONG HERE AND IS NOT USED: out")
    assert "raises" in said[1] and "out of shared memory" in said[1]
    assert calls == [(2, 256, 4), *[x.shape] * 3], "a part of the call is checked, once"
    with op.using("wrong"):  # who forces one gets it
        assert not torch.equal(op(x, w), x * w)


def test_gradients_are_compared_where_there_are_any(caplog: pytest.LogCaptureFixture) -> None:
    op = toy()
    op.register("half", lambda *a: None)(lambda x_BTD, w_D: _WrongGradient.apply(x_BTD, w_D))
    x, w = torch.randn(2, 3, 4), torch.randn(4)
    op(x, w)
    assert not caplog.records, "its outputs are right"
    w.requires_grad_()
    (grad,) = torch.autograd.grad(op(x, w).sum(), w)
    torch.testing.assert_close(grad, x.sum((0, 1)))
    assert "gradient of w_D differs" in caplog.text
    with torch.no_grad():
        op(x, w)
    assert len(caplog.records) == 1


def test_new_kinds_of_call_are_checked_and_traces_and_fakes_are_not() -> None:
    op, calls = toy(), []

    def wrong_when_long(x_BTD: Tensor, w_D: Tensor) -> Tensor:
        calls.append(x_BTD.shape[1])
        return x_BTD * w_D + (x_BTD.shape[1] > 64)

    op.register("short", lambda *a: None)(wrong_when_long)
    w = torch.randn(4)
    for T in (1, 60, 64, 65, 100):
        x = torch.randn(1, T, 4)
        assert torch.equal(op(x, w), x * w)
    assert calls == [1, 1, 60, 60, 64, 65], "one check a power of two; never again once refused"
    meta = torch.empty(1, 500, 4, device="meta")
    assert op(meta, w.to("meta")).shape == meta.shape


def test_the_check_draws_no_random_numbers_and_can_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    op = toy()
    op.register("other", lambda *a: None)(lambda x_BTD, w_D: x_BTD * w_D)
    state = torch.random.get_rng_state()
    x = torch.ones(2, 3, 4, requires_grad=True)
    op(x, torch.ones(4))
    assert torch.equal(state, torch.random.get_rng_state())
    monkeypatch.setenv("MM_SELF_CHECK", "0")
    assert not check.is_checkable((x,))


def test_a_check_inside_a_checkpointed_block_is_not_seen_by_it() -> None:
    op = toy()
    op.register("other", lambda *a: None)(lambda x_BTD, w_D: w_D * x_BTD)
    x, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x, w: op(x, w), x, w, use_reentrant=False)
    assert op._checked
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], x.sum((0, 1)))


def test_settings_by_keyword_and_other_names() -> None:
    op = Op(lambda x_BTD, scale=1.0, *, shift=0.0: x_BTD * scale + shift)
    op.register("other", lambda *a, **k: None)(
        lambda q, factor=1.0, *, shift=0.0: q * factor + shift
    )
    x = torch.randn(2, 3, 4)
    assert torch.equal(op(x, 2.0, shift=1.0), 2 * x + 1)
    assert list(op._checked.values()) == ["other"]


def test_lengths_fit_the_part() -> None:
    op = toy()
    seen = []
    op.register("other", lambda *a: None)(
        lambda x_BTD, w_D, length_B: (seen.append(length_B), x_BTD * w_D)[1]
    )
    op(torch.randn(3, 400, 4), torch.randn(4), torch.tensor([400, 7, 1]))
    assert seen[0].tolist() == [256, 7]


def test_rounding_of_a_gradient_that_is_zero_is_no_fault() -> None:
    """One key takes all the weight, so that the query has no gradient but rounding."""

    def reference(q: Tensor, v: Tensor) -> Tensor:
        return (q - q + v).sin()

    q, v = (torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    arguments = (q.requires_grad_(), v)
    assert check.problem(reference, lambda q, v: (q * 1e-7 + v).sin(), arguments, {}) is None
    assert check.problem(reference, lambda q, v: (q * 1e-2 + v).sin(), arguments, {})
