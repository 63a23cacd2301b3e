"""Law `no silent host` of operators: none asks the device, whichever implementation runs.

The call of every op that `make gpu` makes, by each implementation that takes it on a GPU; what
Triton launches is not launched.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import ROOT
from torch import Tensor

pytest.importorskip("triton")

from mm.kernels.op import Op
from mm.plan.fake_card import fake_card
from mm.plan.fake_cuda import CUDA, fake_cuda, grad

SLOW = pytest.mark.slow


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, Any]]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_page  # pyright: ignore[reportMissingImports]
    from op_calls import Sizes, op_calls  # pyright: ignore[reportMissingImports]

    gpu_page.import_kernels()
    return op_calls(CUDA, Sizes(heads=2, width=16, states=8, classes=64, documents=3))


@pytest.mark.parametrize(
    ("some", "tokens"), [(("attention", "linear_attention"), 20), pytest.param((), 72, marks=SLOW)]
)
def test_no_implementation_asks_the_device(
    calls: dict[str, tuple[str, Any]], some: tuple[str, ...], tokens: int
) -> None:
    """Forward and backward of some ops, or of all; references walk over the tokens: few."""
    calls = {name: call for name, call in calls.items() if call[0] in (some or Op.every)}
    ran: set[str] = set()
    for name, (op_name, call) in calls.items():
        op = Op.every[op_name]
        for way, (_, why_not) in op.implementations.items():
            with fake_cuda() as reads, fake_card():
                given = call(2 if way == "reference" else tokens, torch.bfloat16, 16)
                if why_not(*given) is not None:
                    continue
                with op.using(way):
                    made = op(*given)
                y, *rest = made if isinstance(made, tuple) else (made,)
                outs = [y, *(o for o in rest if o.shape == y.shape)]
                leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
                if y.requires_grad:
                    grad(outs, leaves, [torch.empty_like(o) for o in outs])
            assert reads.places == reads.sends == [], (name, way)
            ran.add(f"{op_name} {way}")
    assert {r.split()[0] for r in ran} == {op for op, _ in calls.values()}
    assert {"attention blocks", "attention varlen", "linear_attention chunked"} <= ran
