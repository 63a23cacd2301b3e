"""Law `no silent host` of slices: on an accelerator no layer that shares rows asks the device.

A process between two others by itself, on fake CUDA tensors; collectives give what they are given.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws import D, mask_of
from sequence_ranks import VARIANTS, build
from torch import Tensor

from mm.layout import Doc, Layout
from mm.model import sequence
from mm.model.context import Ctx
from mm.plan.fake_cuda import CUDA, backward, fake_cuda
from mm.shard import Shard

WHOLE = Layout.from_rows([[Doc(5), Doc(5), Doc(9)], [Doc(4), Doc(3), Doc(16)], [Doc(24)]], 24)
SHARED = [
    name
    for name in VARIANTS
    if name.startswith(("mixer:", "ffn:", "4 heads"))
    and build(name).caps.shard in ("ulysses", "carry", "halo")
    and sequence.why_not(build(name), 4) is None
]


def copied(out: Tensor, given: Tensor, *sizes: Any, group: Any = None) -> None:
    out.copy_(given.view_as(out))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_no_layer_asks_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "dist", SimpleNamespace(all_to_all_single=copied))
    size = 4 if name.startswith("4 heads") else 3
    shard, own = Shard.of(WHOLE, 1, size)
    assert shard.head is not None and shard.begins and shard.through  # it passes on, and begins
    with fake_cuda() as reads:
        with CUDA:
            layer = VARIANTS[name]()
        x = torch.empty(*own.shape, D, device=CUDA, requires_grad=True)
        ids = torch.zeros(*own.shape, 1, dtype=torch.int32, device=CUDA)
        ctx = Ctx(own.to(CUDA), mask_of(layer), ids, shard=shard.map_tensors(lambda t: t.to(CUDA)))
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x, ctx).y
        backward(y.float().sum())
        assert x.grad is not None and x.grad.device.type == "cuda"
    assert reads.places == []
