"""What a run says it was made from: the chain from raw shards to a fine-tuned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import start_toys

from mm.run import Run
from mm.trainer.log import lineage
from mm.trainer.loop import train


def told(run: Run, way: str = "inputs") -> dict[str, dict[str, Any]]:
    rows = json.loads((run.folder / "lineage.json").read_text())[way]
    return {row["name"]: row for row in rows}


def test_the_chain_from_raw_shards_to_a_fine_tuned_model(tmp_path: Path) -> None:
    root = start_toys.packed(tmp_path)
    first = start_toys.make_run(root, tmp_path / "runs", "first", steps=1)
    train(first)
    again = {"init_from": str(first.folder)}
    second = Run.model_validate(start_toys.values(root, tmp_path / "runs", "tuned", **again))
    train(second)
    found = told(first)
    tokens, raw = found["tokens-tokens"], found["data-data"]
    assert tokens["made_from"] == ["data:data-data"] and raw["samples"]["train"] == 40
    assert tokens["version"] != raw["version"] and len(tokens["version"]) == 12
    assert {found["tokenizer-text"]["modality"], found["tokenizer-image"]["modality"]} == {
        "text",
        "image",
    }
    (made,) = told(first, "outputs").values()
    assert made["name"] == "model-first" and made["step"] == 1
    before = told(second)["model-first"]
    assert before["version"] == made["version"]  # the very model
    assert "tokens:tokens-tokens" in before["made_from"]


def test_another_content_is_another_version(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    a, b, c = (lineage.version(tmp_path / name) for name in "abc")
    assert a == b != c and lineage.version(tmp_path) is None


def test_uploads_are_asked_for(tmp_path: Path) -> None:
    root = start_toys.packed(tmp_path)
    for upload in ((), ("model", "data")):
        run = start_toys.make_run(root, tmp_path, "run", tracking={"upload": upload})
        (run.folder / "model").mkdir(parents=True, exist_ok=True)
        (model,) = lineage.outputs(run, 1)
        tokens = next(a for a in lineage.inputs(run) if a.kind == "tokens")
        assert bool(model.files) == bool(tokens.files) == bool(upload)
        assert bool(tokens.references) != bool(upload)


def test_changes_of_the_code_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lineage.write_diff(tmp_path, "abc")
    assert not (tmp_path / lineage.DIFF).exists() and lineage.code(tmp_path, None) == []
    (tmp_path / "config.yaml").write_text("name: x")
    (one,) = lineage.code(tmp_path, "abcdef")
    assert one.name == "code-abcdef" and [f.name for f in one.files] == ["config.yaml"]
