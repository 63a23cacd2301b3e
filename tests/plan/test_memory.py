"""Bytes that are predicted are those of a real step."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from thinned import every

from mm.plan.inputs import documents
from mm.plan.networks import Networks, state_bytes
from mm.plan.tally import LiveBytes, Measure
from mm.plan.trace import Trace, fake_mode, trace_step
from mm.plan.zero import collectives, memory, traffic
from mm.registry import BACKBONES, NETWORKS, OPTIMIZERS

ROOT = Path(__file__).parents[2]


def test_live_bytes_follow_storages() -> None:
    live = LiveBytes()
    x = torch.zeros(256)
    assert live.add(x, "a") and not live.add(x[:3], "b")
    live.relabel(x, "c")
    assert live.now == live.peak == 1024 and live.by["c"] == 1024 and not live.by["a"]
    del x
    gc.collect()
    assert live.now == 0 and live.peak == 1024 and live.at_peak["a"] == 1024


PEAKS = list(
    itertools.product(
        ["attention", "2*rg_lru attention", "gated_deltanet mamba2"], ["none", "selective", "full"]
    )
)


# The first and the last; the slow suite takes all pairs.
@pytest.mark.parametrize(
    "pattern,recompute",
    every(8, (pytest.param(*p) for p in PEAKS)),
)
def test_the_peak_of_a_step_is_the_predicted_one(pattern: str, recompute: str) -> None:
    backbone = {"kind": "stack", "depth": 3, "pattern": pattern, "recompute": recompute}
    config = NETWORKS.parse("lm").model_copy(
        update={"d_model": 64, "backbone": BACKBONES.parse(backbone)}
    )

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        batch = documents(2, 192, 96, None)  # layers remember things of a layout: a new one each
        return model(batch, seed=1).heads["tokens"].nll.sum()

    with fake_mode() as fake:
        planned = config.build().train()
    trace = trace_step(fake, {"model": planned}, lambda: iter([loss_of(planned)]), 384)
    from mm.model.layer import init_weights

    model = config.build().train()
    init_weights(model)
    loss_of(model).backward()  # kernels are compared with their references now, not later
    model.zero_grad()
    with Measure() as measure:
        before = measure.live.now
        loss = loss_of(model)
        kept = measure.live.now - before
        loss.backward()
        del loss
    assert sum(trace.saved.values()) == pytest.approx(kept, rel=0.02)
    assert trace.peak == pytest.approx(measure.live.peak - before, rel=0.02)
    assert trace.gradients == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind, size", [("adamw", 8), ("lion", 4)])
def test_states_are_those_of_the_optimizer(kind: str, size: int) -> None:
    assert state_bytes(OPTIMIZERS.parse(kind)) == size


def _sizes(n: int = 10**9) -> Networks:
    return Networks(n, n // 1000, 100, n // 10, 4, 0, 8.0, {})


def test_a_higher_stage_never_holds_more_weights_or_states() -> None:
    trace = Trace(forward_peak=10**9, peak=2 * 10**9, peak_released=10**9)
    held = [memory(_sizes(), trace, stage, 64, 1, False).parts for stage in range(4)]
    optimizer = [h["optimizer"] for h in held]
    assert optimizer[0] > optimizer[1] == optimizer[2] == optimizer[3]
    assert held[3]["weights"] < held[2]["weights"] == held[0]["weights"]
    assert all(sum(h.values()) > 0 for h in held)


def test_an_average_costs_four_bytes_an_element() -> None:
    trace = Trace(forward_peak=1, peak=1, peak_released=1)
    plain, averaged = (
        memory(_sizes(), trace, 0, 1, 1, e).parts["optimizer"] for e in (False, True)
    )
    assert averaged - plain == 4 * 10**9


def test_bytes_of_collectives() -> None:
    net = _sizes()
    assert collectives(net, 1, 1, 1) == {}
    assert collectives(net, 0, 8, 4) == {"all_reduce": 4 * 10**9}
    assert collectives(net, 2, 8, 4)["all_reduce"] == 16 * 10**9
    assert traffic({"all_reduce": 100}, 4) == 150
    assert traffic({"all_gather": 100}, 4) == 75


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,stage", [*(("dense", stage) for stage in range(4)), ("linear", 1), ("hybrid", 3)]
)
def test_a_large_model_on_two_processes(name: str, stage: int, tmp_path: Path) -> None:
    """100 million parameters and more: peak within 10 %, bytes of collectives within 1 %."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import plan as benchmark
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    asked = SimpleNamespace(d_model=768, depth=15, tokens=256, rows=4, precision="fp32")
    assert os.environ.get("OMP_NUM_THREADS")
    found = benchmark.compare(benchmark.prepare(tmp_path, asked, name), stage, 2)
    assert found["parameters"] >= 100e6
    assert abs(found["peak_error"]) < 0.1
    assert abs(found["sent_error"]) < 0.01
