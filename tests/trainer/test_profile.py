"""`mm train --profile`: the steps that were named, the ten dearest operators, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import losses, make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.trainer.callbacks.profile import Profile, parse_steps
from mm.trainer.loop import Trainer, train


def test_the_named_steps_are_traced_and_no_loss_changes(tmp_path: Path) -> None:
    plain, run = make_run(tmp_path, "plain"), make_run(tmp_path, "traced")
    train(plain)
    told: list[Any] = []
    train(run, callbacks=[Profile(4, 5, lambda rows, trace: told.append((rows, trace)))])
    assert losses(run) == losses(plain)
    ((rows, trace),) = told
    events = json.loads(Path(trace).read_text())["traceEvents"]
    names = [e.get("name") for e in events]
    # one forward a step (a save, at steps 3 and 6, has its own): its loss is there twice
    assert names.count("aten::cross_entropy_loss") == 2
    assert len(rows) == 10 and rows == sorted(rows, key=lambda r: -r["ms"])
    saved = json.loads((run.folder / "profile" / "steps_4_5.ops.json").read_text())
    assert saved == rows and 0 < sum(r["share"] for r in rows) <= 1


@pytest.mark.parametrize("text", ["10", "0:3", "4:3", "a:b", "1:2:3", "-1:2", ""])
def test_bad_ranges_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="FIRST:LAST"):
        parse_steps(text)


def test_steps_that_the_run_has_not_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="the run has 6 steps"):
        Trainer(run, [Profile(5, 7, print)]).fit()
    assert not run.folder.exists()


def test_steps_that_are_done_are_refused(tmp_path: Path) -> None:
    train(make_run(tmp_path, steps=3))
    with pytest.raises(UserError, match="3 steps of this run are done"):
        Trainer(make_run(tmp_path, steps=6), [Profile(3, 5, print)]).fit()
