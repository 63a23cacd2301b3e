"""A checkpoint of others, tuned by its adapters on one's own text, is a checkpoint again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hf_checkpoints import checkpoint

from mm.cli import main as cli
from mm.errors import UserError
from mm.run import Run

RUN = {
    "name": "tuned",
    "out": "runs",
    "vocabulary": "tokens/vocabulary.json",
    "init_from": "mine",
    "model": {"linear": {"kind": "lora", "rank": 2, "base_layer": {"kind": "dense"}}},
    "stages": [
        {
            "data": {
                "kind": "packed",
                "seq_len": 96,
                "batch_size": 2,
                "sources": [{"path": "tokens"}],
            },
            "objective": "next_token",
            "budget": {"steps": 4},
            "schedule": {"shape": "constant", "warmup": 1},
        }
    ],
    "engine": {"precision": "fp32"},
}


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_adapters_are_merged_into_what_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    checkpoint(tmp_path / "theirs", case)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / f"texts/{i}.txt").write_text(f"the cat sat on mat {i}. " * 3)
    assert cli.run(["import", "theirs", "--out", "mine"]) == 0
    words = ["--tokenizers", "mine/tokenizers", "--vocabulary", "mine/vocabulary.json"]
    assert cli.run(["data", "pack", "texts", "--out", "tokens", *words]) == 0
    run = yaml.safe_load(yaml.safe_dump(RUN))
    if case == "qwen2":
        run["model"]["linear"]["base_layer"]["bias"] = ["qkv"]
    Path("run.yaml").write_text(yaml.safe_dump(run))
    assert cli.run(["train", "run.yaml"]) == 0
    # The command itself compares all logits with those of the run.
    assert cli.run(["export", "runs/tuned", "--out", "back"]) == 0

    import transformers

    kind = transformers.AutoModelForCausalLM
    old, new = (dict(kind.from_pretrained(d).named_parameters()) for d in ("theirs", "back"))
    assert old.keys() == new.keys()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all(name.endswith("proj.weight") for name in moved), moved


def test_a_model_without_a_kind_is_the_saved_one_with_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["import", "theirs", "--out", "mine"]) == 0
    for model in (None, {}, {"mask": "prefix"}, {"linear": {"kind": "lora"}}):
        values = {k: v for k, v in RUN.items() if k != "model"}
        Path("run.yaml").write_text(
            yaml.safe_dump(values | ({} if model is None else {"model": model}))
        )
        found = Run.load("run.yaml", ["model.d_model=40"])
        assert found.model.backbone.pattern == "attention attention"  # type: ignore[attr-defined]
        assert found.model.mask == (model or {}).get("mask", "causal")  # type: ignore[attr-defined]
        kind = (model or {}).get("linear", {"kind": "dense"})["kind"]
        assert found.model.linear.kind == kind  # type: ignore[attr-defined]
    Path("run.yaml").write_text(yaml.safe_dump({**values, "model": {"kind": "lm"}}))
    assert Run.load("run.yaml").model.d_model == 128, "one with a kind stands for itself"  # type: ignore[attr-defined]
    Path("run.yaml").write_text(yaml.safe_dump({**values, "init_from": "gone"}))
    with pytest.raises(UserError, match="init_from: gone holds no saved model"):
        Run.load("run.yaml")
    Path("mine/config.json").write_text("{")
    Path("run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        Run.load("run.yaml")
