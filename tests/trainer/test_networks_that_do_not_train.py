"""Teachers, references and averages at ZeRO stage 3: in slices, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import Calls, losses, make_run, resume_bitwise, torchrun
from trainer_toys import toys_registered  # noqa: F401

from mm.run import Run
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.loop import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "ema": {},
    "frozen": {"frozen": True},
    "copied": {"copied": True},
}


def run(tmp_path: Path, name: str, stage: int, kind: str, precision: str = "fp32") -> Run:
    objective = {"kind": "toy_teacher", **KINDS[kind]}
    engine = {"precision": precision}
    data = {"micro": 2}
    return make_run(tmp_path, name, stage=stage, objective=objective, engine=engine, data=data)


# One by default: the other two differ by what makes them, not by how they are cut.
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "ema")) for k in KINDS]
)
def test_a_resume_gives_the_same_bits_at_stage_3(tmp_path: Path, kind: str) -> None:
    whole, halves = (run(tmp_path, name, 3, kind) for name in ("whole", "halves"))
    resume_bitwise(whole, halves, files=("model", "teacher"))


@pytest.mark.parametrize("kind", KINDS)
def test_between_passes_no_process_holds_a_whole_network(tmp_path: Path, kind: str) -> None:
    """A small parameter of one that stays as it is may stay gathered (DeepSpeed's threshold)."""
    seen = []

    def look(trainer: Any) -> None:
        teacher = trainer.stage.frozen["teacher"]
        seen.append({n: p.numel() for n, p in teacher.named_parameters()})
        assert not any(p.requires_grad for p in teacher.parameters())
        assert all(hasattr(p, "ds_tensor") for p in teacher.parameters())

    Trainer(run(tmp_path, "run", 3, kind), [Calls("post_step", look)]).fit()
    if kind == "ema":
        assert not any(n for sizes in seen for n in sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "autocast_bf16", "bf16"])
def test_losses_and_networks_of_two_processes_are_those_of_stage_1(
    tmp_path: Path, precision: str
) -> None:
    runs = {
        (kind, stage): run(tmp_path, f"{kind}-{stage}", stage, kind, precision)
        for kind in KINDS
        for stage in (1, 3)
    }
    torchrun(2, list(runs.values()))
    exact = 1e-6 if precision == "fp32" else 2e-2  # products of stage 3 round elsewhere in bf16
    for kind in KINDS:
        one, three = runs[kind, 1], runs[kind, 3]
        assert losses(three) == pytest.approx(losses(one), rel=exact)
        a, b = (checkpoint.newest(r.folder / "checkpoints") for r in (one, three))
        assert a is not None and b is not None
        mine, theirs = a.tensors("teacher"), b.tensors("teacher")
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(theirs[name], mine[name], rtol=exact, atol=exact)
