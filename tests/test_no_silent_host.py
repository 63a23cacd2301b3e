"""Law `no silent host`: on an accelerator no layer reads a device value on the host.

Layers run on fake CUDA tensors, which hold no values: whatever asks for one fails by name. Packed
training (forward; a backward on CUDA needs a driver), a prefill and a decoding step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from laws import VARIANTS, D, mask_of
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from mm.layout import Doc, Layout
from mm.model.context import Ctx
from mm.model.layer import Layer

B, T, N = 2, 24, 2
NEEDS_A_DRIVER = {"gru", "low_rank_gru", "lstm", "scrn"}  # cuDNN's cells have no fake form
PACKED = Layout.from_rows([[Doc(5), Doc(14)], [Doc(4), Doc(3), Doc(16)]], T, max_documents=8)
PREFILL = Layout.from_rows([[Doc(5, slot=1), Doc(3, slot=0)]], 9)
STEP = Layout.from_rows([[Doc(1, slot=i, fresh=False, start=8)] for i in range(N)], 1)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of device cuda without values; what the host knows stays real."""
    for name in ("on_host", "_arrays"):
        real = getattr(Layout, name)

        def on_the_host(layout: Layout, real: Any = real) -> Any:
            with _disable_current_modes():
                return real(layout)

        monkeypatch.setattr(Layout, name, on_the_host)
    monkeypatch.setenv("MM_SELF_CHECK", "0")
    # Else autocast turns itself off, or refuses bf16, where it sees no driver.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        yield


def run(layer: Layer, layout: Layout, state: Any = None) -> Any:
    """One call under bf16 autocast."""
    shape = layout.shape
    ids = torch.zeros(*shape, 1, dtype=torch.int32)
    ctx = Ctx(layout.to("cuda"), mask_of(layer), ids)
    with torch.autocast("cuda", torch.bfloat16):
        layer.prefetch(ctx, state is not None)
        out = layer(torch.empty(*shape, D), ctx, state)
    assert out.y.device.type == "cuda"
    return out.state


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith(("mixer:", "ffn:"))])
def test_no_layer_asks_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.split(":")[1] in NEEDS_A_DRIVER:
        pytest.skip("cuDNN's cells have no fake form: they need a driver")
    with fake_cuda(monkeypatch):
        layer = VARIANTS[name]()
        run(layer, PACKED)
        if layer.caps.step:
            state = run(layer, PREFILL, layer.initial_state(N, 32))
            run(layer, STEP, state)


def test_the_law_sees_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch), pytest.raises(DataDependentOutputException):
        bool(torch.zeros(3).any())


def test_a_layout_on_a_device_knows_what_it_was_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Tensor] = []
    with fake_cuda(monkeypatch):
        there = PACKED.to("cuda")
        assert there.on_host() is PACKED
        index = torch.arange(B * T, device="cuda").flip(0)
        moved = there.derive(index, again=lambda layout: reads.append(index) or (None, None))
        assert moved.on_host().shape == PACKED.shape and len(reads) == 1
        moved.on_host()
        assert len(reads) == 1  # made once
        bare = there.map_fields(lambda f: f._replace(extra={}))
        assert bare.on_host().fields.document.device.type == "cpu"
        assert "host" not in there.derive(index).memo  # only the device knows: it has to be asked
