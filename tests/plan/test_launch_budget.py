"""What one layer launches in a training step: the counts of a few backbones, so that more is seen.

Fewer is well: put the new figure here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import torch
from laws import ROOT
from torch import Tensor, nn
from torch.utils._triton import has_triton

pytest.importorskip("triton")

from mm.plan.fake_card import compiled_graphs, fake_card
from mm.plan.fake_cuda import CUDA, fake_cuda
from mm.plan.gpu_step import predict
from mm.plan.launches import Launches, LayerLaunches, launches_of
from mm.plan.networks import Networks
from mm.plan.trace import Work
from mm.trainer.data_sheets import GPUS

# backbone: layer -> eager, and with 12 documents in the row; compiled, and with 12 documents
KNOWN = {
    "attention": {"attention + swiglu": (47, 53, 42, 45)},
    "hybrid": {
        "delta_rule + swiglu": (118, 125, 79, 80),
        "attention + swiglu": (47, 53, 42, 45),
    },
    "samba": {
        "mamba + swiglu": (82, 82, 65, 65),
        "attention (window 2048) + swiglu": (47, 53, 42, 45),
    },
}

# layer -> compiled with `engine.combo_kernels`, and with 12 documents
COMBINED = {
    "delta_rule + swiglu": (71, 72),
    "attention + swiglu": (39, 40),
    "mamba + swiglu": (55, 55),
    "attention (window 2048) + swiglu": (39, 40),
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import launch_budget  # pyright: ignore[reportMissingImports]

    yield launch_budget


@pytest.mark.parametrize(("name", "place"), [("attention", 0), ("hybrid", 1), ("samba", 0)])
def test_launches_of_a_layer_in_eager_mode(script: ModuleType, name: str, place: int) -> None:
    documents = (1, script.PACKED)[place]
    rows = script.rows_of(script.backbones()[name], 256, 2048, documents, compiled=False)
    found = {row.name: row.eager for row in rows}
    assert found == {layer: counts[place] for layer, counts in KNOWN[name].items()}


@pytest.mark.slow
def test_the_table_of_backbones(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    before = has_triton()  # torch remembers it: the table must neither hang on it nor change it
    assert script.main(["--tokens", "2048", "--only", ",".join(KNOWN), "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {r["backbone"] for r in rows} == set(KNOWN)
    assert {r["graphs"] for r in rows} == {1}
    assert [r["refusals"] for r in rows] == [[]] * len(rows)  # each may be a CUDA graph
    columns = ("eager", "packed eager", "compiled", "packed compiled")
    for name, layers in KNOWN.items():
        found = {r["layer"]: tuple(r[c] for c in columns) for r in rows if r["backbone"] == name}
        assert found == layers
    assert has_triton() == before
    assert "compiled" in capsys.readouterr().out


@pytest.mark.slow
def test_combo_kernels_launch_fewer(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ["--tokens", "2048", "--only", ",".join(KNOWN), "--combo-kernels", "--json", str(file)]
    assert script.main(words) == 0
    rows = json.loads(file.read_text())
    found = {r["layer"]: (r["compiled"], r["packed compiled"]) for r in rows}
    assert found == COMBINED


class Scaled(nn.Module):
    """Something that a CUDA graph may hold, or may not."""

    def __init__(self, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight, self.change = nn.Parameter(torch.empty(8, device=CUDA)), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x) * self.weight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.exp(), None),
        (lambda x: x.cpu().exp().cuda(), "cpu device"),
        (lambda x: x.add_(1), "it changes"),
    ],
    ids=["fine", "the host", "an input changed"],
)
def test_what_no_cuda_graph_holds(change: Callable[[Tensor], Tensor], said: str | None) -> None:
    with fake_cuda(), fake_card():
        module = Scaled(change)
        graphs = compiled_graphs(module, lambda call: call(torch.empty(4, 8, device=CUDA)))
    refusals = {code.refusal for graph in graphs for code in graph.codes} - {None}
    assert bool(refusals) == bool(said) and all(str(said) in str(r) for r in refusals)


def test_an_operator_counts_what_it_launches() -> None:
    from mm.kernels.rms_norm import rms_norm

    with fake_cuda():
        x = torch.empty(4, 64, device=CUDA)
        with Launches() as launches:
            _ = rms_norm(x, torch.empty(64, device=CUDA), 1e-6)
            assert launches.kernels == {"mm::rms_norm_triton": 1}
            x.view(2, 128).detach()
            (x + x).sum()
    assert launches.kernels == {"mm::rms_norm_triton": 1, "aten::add": 1, "aten::sum": 1}


def test_a_wrapper_is_read_for_what_it_launches() -> None:
    source = """
def call(self, args):
    # triton_poi_fused_add_0.run(in a comment
    buf0 = empty_strided_cuda((8, 8), (8, 1), torch.float32)
    triton_poi_fused_add_0.run(arg0_1, buf0, 64, stream=raw_stream0)
    extern_kernels.mm(buf0, arg1_1, out=buf1)
    buf2 = torch.ops.mm.rms_norm_triton_backward.default(buf1, arg2_1)
    assert_alignment(buf2, 16, 'torch.ops.mm.rms_norm_triton_backward.default')
"""
    found = launches_of(source, {"mm::rms_norm_triton_backward": 3})
    assert found == {"triton_poi_fused_add_0": 1, "mm": 1, "mm::rms_norm_triton_backward": 3}


def test_a_step_waits_for_python_where_kernels_are_short() -> None:
    """A small operator takes its launch, a large product its arithmetic; compiled, fewer wait."""
    gpu, net = GPUS["h100"], cast(Networks, None)
    small = [Work("", "", "aten::mul", 0.0, 1000, torch.bfloat16)] * 90
    product = Work("", "", "aten::mm", 1e12, 1000, torch.bfloat16)
    layer = LayerLaunches("toy", 4, 40, 51, 1, Counter(), [*small, product], 3, 2, 1, 90_000)
    step = Launches()
    step.work, step.flops = layer.work * 4, 4e12
    step.kernels["all"] = 4 * layer.eager
    eager, compiled = (predict([layer], step, net, gpu, 8192, way) for way in (False, True))
    assert eager.launches == 364 and eager.issue == pytest.approx(364 * gpu.launch_s)
    assert compiled.launches == 12 and compiled.busy == pytest.approx(eager.busy, rel=1e-3)
    assert eager.seconds == eager.busy > 4e12 / gpu.bf16
    step.work, step.flops = small * 4, 0.0
    waits = predict([], step, net, gpu, 8192, False)
    assert waits.seconds == waits.issue > waits.busy


def test_a_prediction_is_found_on_the_page(script: ModuleType) -> None:
    from gpu_predictions import CARDS, MODELS, WAYS, stored  # pyright: ignore

    for model in (m for m, (_, world) in MODELS.items() if world == 1):
        found = [stored(model, card, way) for card in CARDS for way in WAYS]
        assert all(0 < f["MFU"] < 1 and f["launches"] > 100 for f in found)
    assert stored("1B-dense", "l40s", "eager") == {}
