"""`mm sweep`: the settings that it draws, trials that are really trained, and one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import start_toys
import yaml

from mm.cli import main
from mm.errors import UserError
from mm.sweep import Sweep

GRID = {
    "method": "grid",
    "metric": {"name": "loss/total", "goal": "minimize"},
    "parameters": {"stages.0.optimizer.lr": {"values": [1e-6, 1e-2]}, "seed": {"value": 3}},
}


def sweep(**change: Any) -> Sweep:
    return Sweep.of(GRID | change, "s.yaml", "s")


def test_a_grid_is_every_combination_in_order() -> None:
    two = {"a": {"values": [1, 2]}, "b": {"values": ["x", "y"]}, "c": {"value": 0}}
    found = list(sweep(parameters=two).trials())
    assert [(t["a"], t["b"]) for t in found] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert len(list(sweep(parameters=two).trials(3))) == 3


def test_a_random_search_draws_the_same_each_time_inside_its_bounds() -> None:
    wide = {
        "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1},
        "depth": {"min": 2, "max": 4},
        "kind": {"values": ["a", "b"]},
        "share": {"min": 0.0, "max": 1.0},
        "q": {"distribution": "q_uniform", "min": 0, "max": 10, "q": 5},
    }
    plan = sweep(method="random", parameters=wide)
    found = list(plan.trials(200))
    assert found == list(plan.trials(200)) and found[:5] == list(plan.trials(5))
    assert found != list(sweep(method="random", parameters=wide, seed=1).trials(200))
    assert all(1e-5 <= t["lr"] <= 1e-1 and 0 <= t["share"] <= 1 for t in found)
    assert {t["depth"] for t in found} == {2, 3, 4} and {t["kind"] for t in found} == {"a", "b"}
    assert {t["q"] for t in found} == {0, 5, 10}
    assert 60 < sum(t["lr"] < 1e-3 for t in found) < 140  # half of them: it is logarithmic


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"methd": "grid"}, "unknown key 'methd'"),
        ({"method": "annealing"}, "method: grid"),
        ({"metric": {"goal": "minimize"}}, "metric: needs name"),
        ({"metric": {"name": "x", "goal": "down"}}, "metric.goal"),
        ({"parameters": {}}, "parameters"),
        ({"parameters": {"a": {"min": 0, "max": 1}}}, "parameters.a: a grid needs values"),
        ({"parameters": {"a": {"values": []}}}, "parameters.a.values"),
        ({"parameters": {"a": 3}}, "parameters.a: needs values"),
        ({"method": "random", "parameters": {"a": {"min": 2, "max": 1}}}, "min first"),
        (
            {
                "method": "random",
                "parameters": {"a": {"min": 0, "max": 1, "distribution": "log_uniform_values"}},
            },
            "above 0",
        ),
    ],
)
def test_a_fault_is_named_by_its_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        sweep(**change)
    with pytest.raises(UserError, match="--wandb"):
        list(sweep(method="bayes").trials())


@pytest.mark.slow
def test_trials_are_trained_ranked_and_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    root = start_toys.packed(tmp_path)
    config = tmp_path / "run.yaml"
    values = start_toys.values(root, tmp_path / "runs", "base", steps=8)
    config.write_text(yaml.safe_dump(values))
    plan = tmp_path / "lr.yaml"
    plan.write_text(yaml.safe_dump(GRID))
    out = tmp_path / "table.json"
    assert main.run(["sweep", str(config), str(plan), "--json", str(out)]) == 0
    best, worst = json.loads(out.read_text())
    assert best["stages.0.optimizer.lr"] == 1e-2 and best["loss/total"] < worst["loss/total"]
    lines = (tmp_path / "runs" / "base-lr.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [best, worst]
    trained = yaml.safe_load((tmp_path / "runs" / best["trial"] / "config.yaml").read_text())
    assert trained["seed"] == 3 and trained["tracking"]["group"] == "base-lr"
    assert trained["stages"][0]["optimizer"]["lr"] == 1e-2
    before = (tmp_path / "runs" / best["trial"] / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert main.run(["sweep", str(config), str(plan)]) == 0  # all is there
    assert "trial 0:" not in capsys.readouterr().out
    after = (tmp_path / "runs" / best["trial"] / "metrics.jsonl").stat().st_mtime_ns
    assert before == after
    plan.write_text(yaml.safe_dump(GRID | {"metric": {"name": "loss/totl"}}))
    assert main.run(["sweep", str(config), str(plan)]) == 2
    assert "did you mean 'loss/total'" in capsys.readouterr().err
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main.run(["sweep", str(config), str(plan), "--wandb"]) == 2
    assert "wandb login" in capsys.readouterr().err
