"""`engine.compile` under DeepSpeed: the losses of eager mode at every stage that it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from start_toys import make_run, packed
from torch import nn
from trainer_runs import losses, resume_bitwise

from mm.engine_config import EngineConfig
from mm.model.backbones.stack import StackConfig
from mm.run import Run
from mm.trainer.loop import train
from mm.trainer.stage import compile_blocks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("compile"))


def compiled(root: Path, out: Path, name: str, stage: int, on: bool = True, **engine: Any) -> Run:
    settings = {"zero_stage": stage, "precision": "fp32", "compile": on, **engine}
    keys = {"steps": 4, "checkpoints": {"every": 2}, "engine": settings}
    return make_run(root, out, name, data={"micro_batch_size": 1}, **keys)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_losses_are_those_of_eager_mode_and_a_resume_has_the_same_bits(
    root: Path, tmp_path: Path, stage: int
) -> None:
    """Two micro-batches, overlap on, so that hooks of gradients fire in a compiled backward."""
    overlap = {"communication": {"overlap_comm": True}}
    eager = compiled(root, tmp_path, "eager", stage, on=False, **overlap)
    whole, halves = (compiled(root, tmp_path, n, stage, **overlap) for n in ("whole", "halves"))
    train(eager)
    resume_bitwise(whole, halves, step=2)
    assert losses(whole) == pytest.approx(losses(eager), rel=1e-5)


def test_stage_3_is_refused_with_the_reason(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine\.compile.*(stage 3|zero_stage)"):
        train(compiled(root, tmp_path, "three", 3))


STATEFUL = {"kind": "stateful", "source": {"path": "tokens"}, "seq_len": 16, "batch_size": 2}


@pytest.mark.parametrize(
    ("engine", "stage", "said"),
    [
        ({"compile": False}, {}, "cuda_graphs: a setting of compiled blocks; set compile: true"),
        ({"zero_stage": 3}, {}, "ZeRO stage 3"),
        ({"offload": {"optimizer": "cpu"}}, {}, "offload.optimizer copies gradients"),
        ({}, {"data": STATEFUL}, "keeps states from step to step"),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_be(
    tmp_path: Path, engine: dict[str, Any], stage: dict[str, Any], said: str
) -> None:
    settings = {"compile": True, "cuda_graphs": True, **engine}
    with pytest.raises(ValueError, match=said):
        make_run(tmp_path, tmp_path, engine=settings, stage=stage)


def test_settings_reach_the_compiler_of_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: asked.append(kw["options"]))
    net = StackConfig(pattern="attention", depth=2).build(16)
    engine = EngineConfig(compile=True, cuda_graphs=True, combo_kernels=True)
    both = {
        "triton.cudagraphs": True,
        "combo_kernels": True,
        "combo_kernels_pointwise_only": True,
    }
    compile_blocks(net, engine.compile_options("cuda"))
    compile_blocks(net, engine.compile_options("cpu"))
    assert asked == [both] * 2 + [None] * 2
    with pytest.raises(ValueError, match="combo_kernels: a setting of compiled blocks"):
        EngineConfig(combo_kernels=True)
