"""What the command line says of the keys of a run."""

from __future__ import annotations

from typing import Any

import pytest
from cli_calls import said

from mm.cli.keys import find_key, list_keys
from mm.cli.schema import run_schema
from mm.cli.train import KINDS, USED
from mm.errors import UserError

DESCRIBED = ("Run", "data", "transform", "task", "callback")


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    return run_schema()["$defs"]


def test_every_key_of_a_run_says_what_it_is(definitions: dict[str, Any]) -> None:
    silent = [
        f"{name}: {key}"
        for name, body in definitions.items()
        # kinds of tests, which other files of this process may have registered, are called toy
        if name.split(".")[0] in DESCRIBED and "toy" not in name
        for key, of in body.get("properties", {}).items()
        if key != "kind" and "description" not in of
    ]
    assert not silent, f"give these fields a description: {', '.join(silent)}"


def test_keys_are_listed_by_path_and_by_word() -> None:
    rates = list_keys("stages.*.optimizer.lr")
    assert {kind for key in rates for kind in key.kind.split(", ")} >= {"adamw", "lion", "muon"}
    assert all(key.what.startswith("peak learning rate") for key in rates)
    assert rates == list_keys("stages.0.optimizer.lr")
    assert [key.path for key in list_keys("hang")] == ["guard.hang_s"]
    heads = list_keys("model.backbone.mixers.*.kv_heads")
    assert "attention" in heads[0].kind.split(", ") and heads[0].type.startswith("whole number")
    top = list_keys()
    assert {"name", "stages.*.budget.steps", "stages.*.optimizer"} <= {key.path for key in top}
    assert not any(key.kind for key in top)
    with pytest.raises(UserError, match="no key fits 'stages.*.warmpu'; did you mean 'warmup'"):
        list_keys("stages.*.warmpu")


def test_the_keys_of_the_help_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    for path in USED:
        assert find_key(path, KINDS).path == path  # a key that is gone is a KeyError
    code, out, _ = said(capsys, "train", "--help")
    assert code == 0 and "stages.0.optimizer.lr  number = 0.003  peak learning rate" in out
    assert "mm config keys" in out
    code, out, _ = said(capsys, "config", "keys", "keep_last")
    assert code == 0 and out.startswith("checkpoints.keep_last  whole number = 2  newest")


def test_a_yaml_that_is_not_there_is_said_with_those_that_train(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = said(capsys, "train", "nope.yaml")
    assert code == 2 and err.startswith("mm: nope.yaml: no such file; shipped: configs/")
    assert "configs/members/digits" in err and "configs/quickstart/hybrid" in err
    assert "mixer/" not in err and "backbone/" not in err and "tokenizer/text" not in err
    code, _, err = said(capsys, "train", "configs/quickstart/hybird.yaml")
    assert code == 2 and "did you mean 'configs/quickstart/hybrid'" in err


def test_a_table_too_wide_for_the_terminal_is_lines_with_whole_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm.cli.common import table

    monkeypatch.setenv("COLUMNS", "60")
    long = "recognition_audio_to_text_theo/audio_to_text_accuracy"
    table("t", ("figure", "value", "bar", "n"), [(long, "94.0 %", None, 50)])
    assert capsys.readouterr().out == f"t\n{long}\n  value 94.0 %, n 50\n"
    table("t", ("figure", "value"), [("short", 1)])
    assert "│ short" in capsys.readouterr().out
