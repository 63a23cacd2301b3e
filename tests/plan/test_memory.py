"""Bytes that are predicted are those of a real step."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from thinned import every

from mm.plan.inputs import documents
from mm.plan.memory import memory
from mm.plan.networks import Networks, state_bytes
from mm.plan.speed import message_seconds, network_seconds
from mm.plan.tally import LiveBytes, Measure
from mm.plan.trace import Trace, fake_mode, trace_step
from mm.plan.zero import Zero, collectives, messages, traffic
from mm.registry import BACKBONES, NETWORKS, OPTIMIZERS
from mm.trainer.data_sheets import GPUS

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


def test_live_bytes_begin_with_tensors_that_the_collector_no_longer_sees() -> None:
    before = LiveBytes()
    before.add_all()
    x = torch.zeros(2**16)
    gc.freeze()  # as a run does with what a stage is made of
    try:
        live = LiveBytes()
        live.add_all()
        assert gc.get_freeze_count(), "what was frozen stays frozen"
    finally:
        gc.unfreeze()
    assert live.now - before.now >= 4 * 2**16 == x.untyped_storage().nbytes()


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
    return Networks(n, n // 1000, 100, n // 10, 4, 0, 0, (0, 0), 8.0, {})


def test_a_higher_stage_never_holds_more_weights_or_states() -> None:
    trace = Trace(forward_peak=10**9, peak=2 * 10**9, peak_released=10**9)
    held = [memory(_sizes(), trace, Zero(stage, 64), 1).parts for stage in range(4)]
    optimizer = [h["optimizer"] for h in held]
    assert optimizer[0] > optimizer[1] == optimizer[2] == optimizer[3]
    assert held[3]["weights"] < held[2]["weights"] == held[0]["weights"]
    assert all(sum(h.values()) > 0 for h in held)


def test_an_average_costs_four_bytes_an_element() -> None:
    trace = Trace(forward_peak=1, peak=1, peak_released=1)
    plain, averaged = (
        memory(_sizes(), trace, Zero(0, 1, ema=e), 1).parts["optimizer"] for e in (False, True)
    )
    assert averaged - plain == 4 * 10**9


def test_what_is_offloaded_lies_on_the_host() -> None:
    net, trace = Networks(1000, 40, 10, 100, 4, 0, 0, (0, 0), 8.0, {}), Trace()
    here = lambda *args, micros=1, **kw: memory(net, trace, Zero(*args, **kw), micros)
    one = here(1, 4, overlap=True, bucket=50, optimizer="cpu", background=True)
    assert one.parts == {
        "weights": 4000, "gradients": 0, "optimizer": 0, "activations": 0, "logits": 0,
        # two buckets and a copy of one that is sent; a gradient on its way to the host
        "gathered weights": 0, "buffers": 3 * 4 * 50 + 4 * 100,
    }  # fmt: skip
    # slices of 250: masters and two states; gradients in fp32; weights on their way up, a gradient
    assert one.host == {
        "gradients": 1000, "buffers": 1000 + 400, "optimizer": 3000, "copies of a save": 3000,
    }  # fmt: skip
    both = here(3, 4, bucket=50, prefetch=50, optimizer="cpu", parameters="cpu")
    assert both.host == {"weights": 1000, "gradients": 2000, "optimizer": 3000}
    assert both.parts["weights"] == 4 * 40 and both.parts["optimizer"] == 0
    assert both.parts["gathered weights"] == 4 * (960 + 50)
    disk = here(3, 4, optimizer="nvme")
    assert disk.disk == {"optimizer": 3000, "gradients": 1000} and disk.host["gradients"] == 1000
    plain, near = here(3, 4), here(3, 4, near=2)
    assert near.phases["step"] - plain.phases["step"] == 4 * 960 / 2
    half = here(3, 4, wire=2).phases["step"]
    assert plain.phases["step"] - half == 2 * 1000


def test_bytes_of_collectives() -> None:
    net = _sizes()
    assert collectives(net, Zero(1, 1), 1) == {}
    assert collectives(net, Zero(0, 8), 4) == {"all_reduce": 4 * 10**9}
    assert collectives(net, Zero(2, 8), 4)["all_reduce"] == 16 * 10**9
    assert collectives(net, Zero(2, 8, wire=2), 4)["all_reduce"] == 8 * 10**9
    far, near = (collectives(net, Zero(3, 8, near=n), 4) for n in (1, 2))
    assert near["all_gather"] == 4 * 10**9 and near["reduce_scatter"] == 16 * 10**9
    assert near["all_gather near"] + near["all_gather"] == far["all_gather"]
    assert traffic({"all_reduce": 100}, 4) == 150
    assert traffic({"all_gather": 100}, 4) == 75
    assert traffic({"all_gather near": 100}, 4, 2) == 50


@pytest.mark.parametrize("stage", [0, 1])
def test_what_overlaps_hides_behind_the_backward(stage: int) -> None:
    net, gpu = _sizes(), GPUS["h100"]
    here = lambda zero, seconds: network_seconds(
        net, gpu, zero, 8, 1, {"forward": 9.0, "backward": 9.0, "last backward": seconds, "step": 0}
    )
    open_, none = here(Zero(stage, 8, bucket=10**8), 9.0)
    assert none == 0
    little, hidden = here(Zero(stage, 8, overlap=True, bucket=10**8), 1e-3)
    assert hidden == pytest.approx(1e-3) and little + hidden == pytest.approx(open_)
    most, _ = here(Zero(stage, 8, overlap=True, bucket=10**8), 9.0)
    alone = {
        m.when: message_seconds(m.kind, m.bytes, m.calls, gpu, Zero(stage, 8), 8)
        for m in messages(net, Zero(stage, 8, bucket=10**8), 1)
    }
    # the last of ten buckets, and what the update waits for
    assert most == pytest.approx(alone["last backward"] / 10 + alone.get("step", 0.0))


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


def test_what_does_not_train_is_cut_at_stage_3_alone() -> None:
    """A LoRA's base in the network, and a teacher beside it; buffers are whole everywhere."""
    net, trace = Networks(1000, 40, 10, 100, 4, 64, 8000, (400, 80), 8.0, {}), Trace()
    weights = lambda stage: memory(net, trace, Zero(stage, 4), 1).parts["weights"]
    assert weights(2) == 64 + 4000 + 8000 + 400
    assert weights(3) == 64 + 4 * (1000 + 40 * 4) // 4 + 8000 // 4 + 400 // 4
    sent = collectives(net, Zero(3, 4), 2)["all_gather"]
    assert (
        sent
        - collectives(replace(net, still_bytes=0, other_bytes=(0, 0)), Zero(3, 4), 2)["all_gather"]
        == 2 * 8400
    )
