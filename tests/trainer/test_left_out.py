"""What a run says of its data before its first step, and what it refuses to leave out unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from start_toys import make_run, packed

from mm.errors import UserError
from mm.trainer import survey
from mm.trainer.log import metrics
from mm.trainer.loop import train

TASKS = {"kind": "any_to_any", "condition_dropout": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 captioned pictures of 4 + 2 tokens; five captions are 30 times as long as the others."""
    return packed(tmp_path_factory.mktemp("left_out"))


def told(run: Any) -> str:
    with pytest.raises(UserError) as error:
        train(run)
    assert not (run.folder / "config.yaml").exists()
    return str(error.value)


def test_the_start_is_a_table_and_a_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(root, tmp_path)
    train(run)
    found = json.loads((run.folder / "start.json").read_text())
    (stage,) = found["stages"]
    (source,) = stage["sources"]
    assert source["samples"] == source["modalities"]["image"]["samples"] == 40
    assert source["modalities"]["image"]["tokens"] == 40 * 6 and source["left_out"] == {}
    assert found["parameters"]["model"] > 0 and found["device"] == "cpu" and found["world"] == 1
    shown = capsys.readouterr().err
    assert f"{found['parameters']['model']:,} parameters; cpu, fp32, 1 process" in shown
    assert "240" in shown and "epochs" in shown


@pytest.mark.parametrize("columns", ["80", "200"])
def test_a_terminal_of_80_columns_breaks_no_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    entry = {"samples": 1_234_567, "tokens": 123_456_789, "bytes": 987_654_321}
    source = {"split": "train", "epochs": 12.34, "modalities": {"image": entry, "text": entry}}
    paths = ("photographs_run/tokens", "recordings_run/tokens", "elsewhere/photographs")
    sources = [source | {"source": path, "left_out": {}} for path in paths]
    found: dict[str, Any] = {"parameters": {"model": 1}, "trained": {"model": 1}, "world": 1}
    found |= {"device": "cpu", "precision": "fp32"}
    run = make_run(tmp_path, tmp_path)
    survey.show(run, found | {"stages": [{"stage": 0, "sources": sources[1:]}]})
    lines = capsys.readouterr().err.splitlines()
    for name in ("tokens (train)", "photographs"):
        (line,) = [line for line in lines if line.strip().startswith(name)]
        assert "1,234,567" in line and "123,456,789" in line and "none" in line
    assert "of tokens" not in "".join(lines), "nothing is left out"
    sources[1] |= {"left_out": {"too_long": {"samples": 0.05, "tokens": 0.28}}}
    survey.show(run, found | {"stages": [{"stage": 0, "sources": sources}]})
    shown = capsys.readouterr().err
    assert "of tokens" in shown and "5.0%" in shown and "28.0%" in shown
    if columns == "200":  # both are called tokens
        assert "photographs_run/tokens (train)" in shown
        assert "recordings_run/tokens (train)" in shown and "\n photographs (train)" in shown


def test_more_than_a_tenth_left_out_stops_the_run_and_names_the_keys(
    root: Path, tmp_path: Path
) -> None:
    """An eighth of the captions is too long, and holds most of the tokens."""
    line = told(make_run(root, tmp_path, data={"seq_len": 64}))
    assert "12.5% of the samples and " in line and "stages.0.data.seq_len=" in line
    assert "stages.0.data.cut=true" in line and "chunk" in line and "allow_left_out" in line
    assert "\n" not in line


def test_what_is_allowed_is_warned_of(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = {"allow_left_out": 1.0}
    run = make_run(root, tmp_path, data={"seq_len": 64}, stage=stage, steps=1)
    train(run)
    (line,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert line.startswith("stages.0.data: ") and "12.5% of the samples" in line
    (source,) = json.loads((run.folder / "start.json").read_text())["stages"][0]["sources"]
    assert source["left_out"]["too_long"]["samples"] == pytest.approx(5 / 40)
    chunk = [{"kind": "chunk", "tokens": 20}]
    caplog.clear()
    train(make_run(root, tmp_path, "chunked", data={"seq_len": 64, "transform": chunk}, steps=1))
    assert "left out" not in caplog.text


def test_a_modality_that_gets_nothing_stops_the_run(root: Path, tmp_path: Path) -> None:
    """All pictures are left out, as the first hour's user met it: every share is allowed."""
    tasks = TASKS | {"tasks": {"image": 1.0, "text": 1.0}}
    chunk = {"kind": "chunk", "tokens": 2}
    data = {"seq_len": 5, "transform": [tasks, chunk]}
    line = told(make_run(root, tmp_path, data=data, stage={"allow_left_out": 1.0}))
    assert "stages.0: 'image' gets nothing: all 40 samples that have it are left out" in line
    assert "stages.0.data.seq_len=" in line and "stages.0.allow_empty=[image]" in line
    wrong = {"allow_left_out": 1.0, "allow_empty": ["imag"]}
    line = told(make_run(root, tmp_path, data=data, stage=wrong))
    assert "stages.0.allow_empty: nothing is called 'imag'" in line and "image" in line
    stage = {"allow_left_out": 1.0, "allow_empty": ["image"]}
    run = make_run(root, tmp_path, "allowed", data=data, stage=stage, steps=1)
    train(run)
    (row,) = metrics.read(run.folder / "metrics.jsonl")
    assert "loss/text" in row and "loss/image" not in row, "a loss without targets is no 0"


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        ({"image>txt": 1.0}, "any_to_any task 'image>txt' names 'txt', which is no modality"),
        ({"image>audio": 1.0, "text": 1.0}, "'image>audio' names 'audio'"),
    ],
)
def test_a_modality_that_is_not_there_is_named(
    root: Path, tmp_path: Path, tasks: dict[str, float], named: str
) -> None:
    objective = {"kind": "next_token", "transform": TASKS | {"tasks": tasks}}
    assert named in told(make_run(root, tmp_path, stage={"objective": objective}))


def test_a_task_that_gets_no_document_is_named(root: Path, tmp_path: Path) -> None:
    """A picture and its caption together do not fit, each alone does."""
    tasks = TASKS | {"tasks": {"image": 1.0, "text": 1.0, "image>text": 0.001}}
    data = {"seq_len": 8, "transform": [tasks, {"kind": "chunk", "tokens": 6}]}
    line = told(make_run(root, tmp_path, data=data, stage={"allow_left_out": 1.0}))
    assert "any_to_any task 'image>text' gets nothing" in line
    assert "stages.0.allow_empty=[image>text]" in line


def test_a_weight_of_what_no_source_has_is_named(root: Path, tmp_path: Path) -> None:
    tasks = TASKS | {"tasks": {"text": 1.0}}
    stage = {"objective": {"kind": "next_token", "weights": {"image": 2.0}, "transform": tasks}}
    assert "'image' gets nothing: no task of any_to_any takes it" in told(
        make_run(root, tmp_path, stage=stage)
    )


def test_the_start_of_a_tokenizer_run(root: Path, tmp_path: Path) -> None:
    """Samples, epochs and parameters of raw items."""
    from mm.tokenizers.image.vq import ImageVqConfig

    data = {"kind": "items", "path": str(root / "data"), "size": 8, "batch_size": 4}
    run = make_run(root, tmp_path, steps=5).to_dict()
    run |= {"vocabulary": None, "tokenizers": {}, "model": ImageVqConfig.smallest().to_dict()}
    objective = {"kind": "vq"}
    run["stages"] = [{**run["stages"][0], "data": data, "objective": objective}]
    from mm.run import Run

    made = Run.model_validate(run)
    train(made)
    found = json.loads((made.folder / "start.json").read_text())
    (source,) = found["stages"][0]["sources"]
    assert source["samples"] == 40 and source["epochs"] == pytest.approx(0.5)
    assert source["modalities"]["image"]["bytes"] > 0 and found["parameters"]["model"] > 0
