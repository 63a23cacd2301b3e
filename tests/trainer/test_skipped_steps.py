"""A step that is not finite leaves nothing behind: no weights, no carried State, no grudge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_toys import token_shards
from test_carried_states import make_run as make_carried_run
from trainer_runs import Calls, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.objectives.next_token import NextToken
from mm.run import Run
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.health.anomaly import Guard, RollBack
from mm.trainer.loop import Trainer


@pytest.mark.parametrize("stage", [0, 2])
def test_an_infinite_loss_with_a_finite_gradient_is_not_applied(
    tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is added to the loss without a gradient: only the loss itself tells that it is bad."""
    terms = NextToken.terms

    def with_infinity(self: NextToken, micros: Any, nets: Any, env: Any) -> Iterator[Any]:
        for term in terms(self, micros, nets, env):
            more = float("inf") if env.step == 2 else 0.0
            yield term._replace(losses={k: s + more for k, s in term.losses.items()})

    monkeypatch.setattr(NextToken, "terms", with_infinity)
    run = make_run(tmp_path, steps=4, stage=stage, checkpoints={"every": 1, "keep_last": 9})
    Trainer(run).fit()
    assert [row["skipped"] for row in rows(run)] == [0, 0, 1, 1]
    before, bad, after = (
        checkpoint.Saved(run.folder / "checkpoints" / f"step_{n:06d}", {}).tensors("model")
        for n in (2, 3, 4)
    )
    names = [n for n in before if n != "seen"]
    assert all(torch.equal(before[n], bad[n]) for n in names)
    assert not all(torch.equal(bad[n], after[n]) for n in names)


def test_a_skipped_step_leaves_the_carried_states(tmp_path: Path) -> None:
    """The State after a step that was not applied is that of the step before, and finite."""
    token_shards(tmp_path, 37)
    run = make_carried_run(tmp_path, tmp_path, "carried", steps=5, pattern="rg_lru")
    seen: list[list[torch.Tensor]] = []

    def poison(trainer: Any) -> None:
        """Step 3 alone sees a weight that is not a number."""
        weight = trainer.stage.engines["model"].raw.get_parameter("embedder.weight")
        if len(seen) == 2:
            poison.kept = weight.detach().clone()  # type: ignore[attr-defined]
            weight.data.fill_(float("nan"))

    def note(trainer: Any) -> None:
        if len(seen) == 2:
            weight = trainer.stage.engines["model"].raw.get_parameter("embedder.weight")
            weight.data.copy_(poison.kept)  # type: ignore[attr-defined]
        seen.append([leaf.clone() for leaf in trainer.stage.nets.carried.state.leaves()])

    Trainer(run, [Calls("pre_step", poison), Calls("post_step", note)]).fit()
    assert rows(run)[-1]["skipped"] == 1
    assert len(seen) == 5 and all(leaf.isfinite().all() for state in seen for leaf in state)
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))


def test_the_guard_forgets_bad_steps_outside_its_window(tmp_path: Path) -> None:
    run = Run.model_validate(
        make_run(tmp_path).to_dict()
        | {"guard": {"window": 10}, "engine": {"max_skips": 2, "precision": "fp32"}}
    )
    guard = Guard(run, is_main=False)
    for step in range(0, 60, 6):  # at most two of any ten
        guard.skip(step, "model", {}, [])
    with pytest.raises(RollBack, match="3 of the last 10 steps"):
        guard.skip(56, "model", {}, [])


def test_a_resumed_run_remembers_its_bad_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=6, checkpoints={"every": 2})
    kept: list[dict[str, Any]] = []

    def skip_and_stop(trainer: Any) -> None:
        if trainer.step == 1:
            trainer.state.guard.skip(1, "model", {}, [])
        if trainer.step == 3:
            raise KeyboardInterrupt

    note = lambda trainer: kept.append(trainer.state.guard.state_dict())
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, [Calls("post_step", skip_and_stop), Calls("on_save", note)]).fit()
    Trainer(run, [Calls("pre_step", note)]).fit()
    assert kept[0] == kept[1] != Guard(run, is_main=False).state_dict()
