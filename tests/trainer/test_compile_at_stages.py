"""`engine.compile` under DeepSpeed: the losses of eager mode at every stage that it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from start_toys import make_run, packed
from trainer_runs import losses, resume_bitwise

from mm.run import Run
from mm.trainer.loop import train


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
