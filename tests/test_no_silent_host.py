"""Law `no silent host`: on an accelerator no layer reads a device value on the host.

Layers run on fake CUDA tensors, which hold no values: what asks for one is noted by line, tensors
of two devices and operators without a fake form fail. Packed training with its backward, a prefill
and a decoding step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import VARIANTS, D, context
from thinned import every
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm.kernels.op import Op
from mm.layout import Doc, Layout
from mm.model.layer import Layer
from mm.plan.fake_cuda import CUDA, backward, fake_cuda, grad

B, T, N = 2, 24, 2
ONE = torch.ones(3)
PACKED = Layout.from_rows([[Doc(5), Doc(14)], [Doc(4), Doc(3), Doc(16)]], T, max_documents=8)
PREFILL = Layout.from_rows([[Doc(5, slot=1), Doc(3, slot=0)]], 9)
STEP = Layout.from_rows([[Doc(1, slot=i, fresh=False, start=8)] for i in range(N)], 1)


def run(layer: Layer, layout: Layout, state: Any = None) -> Any:
    """One call under bf16 autocast; of a new document with its backward."""
    shape = layout.shape
    ids = torch.zeros(*shape, 1, dtype=torch.int32, device=CUDA)
    x = torch.empty(*shape, D, device=CUDA, requires_grad=state is None)
    ctx = context(layer, x, layout.to(CUDA), ids=ids)
    with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(state is None):
        layer.prefetch(ctx, state is not None)
        out = layer(x, ctx, state)
    assert out.y.device.type == "cuda"
    if state is None:
        backward(out.y.float().sum())
        assert x.grad is not None and x.grad.device.type == "cuda"
    return out.state


@pytest.mark.parametrize(
    "name", every(3, [n for n in VARIANTS if n.startswith(("mixer:", "ffn:"))])
)
def test_no_layer_asks_the_device(name: str) -> None:
    with fake_cuda() as reads:
        with CUDA:
            layer = VARIANTS[name]()
        run(layer, PACKED)
        if layer.caps.step:
            with CUDA:
                state = layer.initial_state(N, 32)
            run(layer, STEP, run(layer, PREFILL, state))
    assert reads.places == []


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool((x > 0).any()),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).copy_(x),
    ],
)
def test_the_law_sees_a_read(read: Any) -> None:
    with fake_cuda() as reads:
        read(torch.zeros(3, device=CUDA))
    assert len(reads.places) == 1
    assert reads.places[0].startswith("tests/test_no_silent_host.py:")


def test_the_law_sees_a_read_in_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of attention in tiles that asks which of them are hidden."""
    from mm.kernels.attention import attention, blocks
    from mm.kernels.attention.spec import MaskSpec

    def places() -> list[str]:
        with fake_cuda() as reads:
            row = torch.zeros(1, 9, dtype=torch.int32, device=CUDA)
            q = torch.empty(1, 9, 2, 8, device=CUDA, requires_grad=True)
            with attention.using("blocks"):
                y = attention(q, q, q, MaskSpec(document_RT=row, document_RS=row))
            forward = len(reads.places)
            backward(y.sum())
            assert forward == len(reads.places) / 2
        return reads.places

    assert places() == []
    monkeypatch.setattr(blocks, "ASKED", ("cpu", "cuda"))
    assert {p.partition(" ")[2] for p in places()} == {
        "a value: if self.asks and both.all():",
        "a value: if not self.asks or both.any():",
    }


@pytest.mark.parametrize("send", [lambda: torch.tensor(3.0, device=CUDA), lambda: ONE.to(CUDA)])
def test_the_law_sees_what_an_operator_sends(send: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host inside an operator, which no CUDA graph holds; outside it is none."""
    from mm.kernels.attention import attention, blocks

    real = blocks.forward
    monkeypatch.setattr(blocks, "forward", lambda *given: (send(), real(*given))[1])
    with fake_cuda() as reads:
        send()
        assert reads.sends == []
        q = torch.empty(1, 9, 2, 8, device=CUDA)
        with attention.using("blocks"):
            attention(q, q, q)
    assert len(reads.sends) == 1 and "a copy from the host" in reads.sends[0]


@pytest.mark.parametrize("read", [lambda x: x.cpu(), lambda x: x.tolist(), lambda x: bool(x.any())])
def test_the_law_sees_every_read_in_an_operator(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.kernels.attention import attention, blocks

    real = blocks.forward
    monkeypatch.setattr(blocks, "forward", lambda *given: (read(given[0]), real(*given))[1])
    with fake_cuda() as reads:
        q = torch.empty(1, 9, 2, 8, device=CUDA)
        with attention.using("blocks"):
            attention(q, q, q)
    assert len(reads.places) == 1


def test_the_law_sees_tensors_of_two_devices_and_sizes_by_value() -> None:
    with fake_cuda():
        x = torch.zeros(3, device=CUDA)
        with pytest.raises(RuntimeError, match="device"):
            torch.add(x, torch.zeros(3))
        with pytest.raises(Exception, match="nonzero"):
            x.nonzero()


def test_what_the_host_knows_stays_real() -> None:
    with fake_cuda() as reads:
        assert torch.arange(5).nonzero().tolist() == [[1], [2], [3], [4]]
        assert int(PACKED.to(CUDA).on_host().cu_seqlens[1]) == 5
    assert reads.places == []


class Twice(torch.autograd.Function):
    """Takes what is no tensor, gives two results; a gradient that nobody has is zeros."""

    @staticmethod
    def forward(ctx: Any, factor: float, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.factor = factor
        return x * factor, x + 1

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[None, Tensor]:
        return None, above[0] * ctx.factor + above[1]


def function(w: Tensor, x: Tensor) -> Tensor:
    """Broadcasts, casts, views, an Op, a recomputed part, a leaf used twice."""
    norm = Op.every["rms_norm"]
    y = norm((x @ w).tanh() + w[0], w[1])
    first, _ = Twice.apply(3.0, y)  # type: ignore[misc]
    again = checkpoint(lambda a: (a * w[2]).exp(), first, use_reentrant=False)
    parts = again.double().split(2, -1)
    return (parts[0] * parts[1].cumsum(0)).sum() + first.square().mean()


def test_formulas_called_from_here_give_the_gradients_of_autograd() -> None:
    import mm.kernels.rms_norm  # noqa: F401  the op registers

    torch.manual_seed(0)
    w, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(function(w, x), (w, x))
    with fake_cuda():  # tensors of the host stay real
        found = grad(function(w, x), (w, x))
        backward(function(w, x))
    for e, f, a in zip(expected, found, (w.grad, x.grad), strict=True):
        assert f is not None and a is not None
        torch.testing.assert_close(f, e)
        torch.testing.assert_close(a, e)


def test_a_layout_on_a_device_knows_what_it_was_made_from() -> None:
    reads: list[Tensor] = []
    with fake_cuda():
        there = PACKED.to(CUDA)
        assert there.on_host() is PACKED
        index = torch.arange(B * T, device=CUDA).flip(0)
        moved = there.derive(index, again=lambda layout: reads.append(index) or (None, None))
        assert moved.on_host().shape == PACKED.shape and len(reads) == 1
        moved.on_host()
        assert len(reads) == 1  # made once
        bare = there.map_fields(lambda f: f._replace(extra={}))
        assert bare.on_host().fields.document.device.type == "cpu"
        assert "host" not in there.derive(index).memo  # only the device knows: it has to be asked
