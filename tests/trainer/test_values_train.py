"""Runs that predict values and labels, from files to a forecast: they train, resume and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thinned import only
from trainer_runs import resume_bitwise, rows

from mm.data.modalities.base import BadSample, get_modality
from mm.data.pack.job import pack
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.run import Run
from mm.tasks.forecast import Forecast
from mm.tasks.transcription import Transcription, edit_distance
from mm.tokenizers.series.patches import SeriesPatchesConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.loop import train

TASKS = {"time_series": 1.0, "text>time_series": 1.0, "time_series>text": 1.0}
ASK = {"kind": "any_to_any", "tasks": TASKS, "condition_dropout": 0.2}
LABEL = {"kind": "to_label", "modalities": ["text"], "keep": True}
MODEL: dict[str, Any] = {
    "kind": "lm",
    "d_model": 16,
    "adapters": {"time_series": {"kind": "linear", "d_in": 4}},
    "backbone": {"kind": "stack", "depth": 2, "pattern": "attention rg_lru",
                 "mixers": {"rg_lru": {"heads": 2}, "attention": {"heads": 2}},
                 "block": {"kind": "prenorm", "dropout": 0.1}},
    "heads": {
        "tokens": {"kind": "multi_token", "ahead": 2, "hidden": 8},
        "time_series": {"kind": "mixture", "d_out": 4, "components": 2, "density": "student_t"},
        "text": {"kind": "ctc", "split": 3},
    },
}  # fmt: skip


def tokenizers() -> dict[str, Any]:
    series = SeriesPatchesConfig(patch=4, channels=1, norm_points=8)
    return {"time_series": series.build(), "text": BytesConfig(modality="text").build()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("series")
    source = root / "source" / "train"
    source.mkdir(parents=True)
    for i in range(24):
        t = np.arange(16 + 4 * (i % 4))
        x = 100 + 10 * np.sin(2 * np.pi * (t + i) / 8)
        (source / f"{i:02d}.series").write_text("".join(f"{v:.3f}\n" for v in x))
        (source / f"{i:02d}.txt").write_text(f"p{i % 8}")
    pack(root / "source", root / "data", progress=False)
    pack(root / "source", root / "tokens", tokenizers=tokenizers(), progress=False)
    return root


def make_run(data: Path, out: Path, name: str, *, stage: int = 0, **change: Any) -> Run:
    stream = {"kind": "packed", "sources": [{"path": str(data / "tokens")}], "seq_len": 32}
    sizes = {"batch_size": 4, "micro_batch_size": 2, "max_documents": 4}
    return Run.model_validate(
        {
            "name": name,
            "out": out,
            "vocabulary": data / "tokens" / "vocabulary.json",
            "model": change.pop("model", MODEL),
            "stages": [
                {
                    "data": stream | sizes | {"transform": change.pop("transform", [ASK, LABEL])},
                    "objective": {
                        "kind": "next_token",
                        "aux_weights": {"multi_token": 0.3},
                        "weights": {"time_series_values": 0.5, "text_label": 0.2},
                    },
                    "budget": {"steps": change.pop("steps", 6)},
                    "optimizer": {"kind": "adamw", "lr": 1e-2},
                }
            ],
            "engine": {"precision": "fp32", "zero_stage": stage},
            "checkpoints": {"every": 2},
            **change,
        }
    )


@pytest.mark.parametrize("stage", only([0, 3], 0))
def test_resume_is_bitwise(data: Path, tmp_path: Path, stage: int) -> None:
    whole, halves = (make_run(data, tmp_path, name, stage=stage) for name in ("whole", "halves"))
    (found,) = resume_bitwise(whole, halves)
    assert len(found) > 20
    seen = rows(whole)
    for name in ("time_series_values", "text_label", "multi_token"):
        values = [row[f"loss/{name}"] for row in seen if f"loss/{name}" in row]
        assert values and np.isfinite(values).all(), name


def test_what_no_head_predicts_is_refused_before_step_one(data: Path, tmp_path: Path) -> None:
    heads = {"tokens": "softmax", "text": {"kind": "ctc"}}
    with pytest.raises(
        UserError, match=r"stages.0: 'time_series' is predicted .values., and model"
    ):
        train(make_run(data, tmp_path, "none", model=MODEL | {"heads": heads}))
    heads = {"tokens": "softmax", "time_series": MODEL["heads"]["time_series"]}
    with pytest.raises(UserError, match=r"'text' is predicted .labels., and model.heads has none"):
        train(make_run(data, tmp_path, "none", model=MODEL | {"heads": heads}))


def test_a_sine_is_told_better_than_its_last_season(data: Path, tmp_path: Path) -> None:
    """From files to a forecast, and a label read by CTC: the whole way of the tasks."""
    run = make_run(data, tmp_path, "tell", steps=4)
    train(run)
    generator = Generator.from_pretrained(run.folder)
    generator.tokenizers = tokenizers()
    task = Forecast(data=data / "data", split="train", horizon=8, period=8)
    task.check(generator.vocabulary, generator.tokenizers)
    found = task.evaluate(generator)
    assert found["time_series_n"] == 24 and found["time_series_seasonal_naive_mae"] < 0.01
    assert found["time_series_mae_ratio"] > 1  # nothing is better than a sine's own last period
    drawn = Forecast(data=data / "data", split="train", horizon=6, period=8, samples=3)
    assert drawn.evaluate(generator, seed=1) == drawn.evaluate(generator, seed=1)
    with pytest.raises(UserError, match="has 16 points; a forecast of 12 beside a season of 8"):
        Forecast(data=data / "data", split="train", horizon=12, period=8).evaluate(generator)
    read = Transcription(data=data / "data", split="train", source="time_series")
    read.check(generator.vocabulary, generator.tokenizers)
    assert read.evaluate(generator)["time_series_to_text_words"] == 24
    assert edit_distance("a b c".split(), "a c d".split()) == 2


def test_bad_series_say_where() -> None:
    modality = get_modality("time_series")
    for bad, why in (
        (b"1\nx\n", "line 2 is not numbers"),
        (b"1 2\n3\n", "line 2 has 1 channels, the first 2"),
        (b"1\nnan\n", "point 2 is not finite"),
        (b"1e60\n", "point 1 is not finite"),
        (b"\n\n", "no points"),
    ):
        with pytest.raises(BadSample, match=why):
            modality.decode(bad)
    assert modality.decode(b"1,2\n\n3\t4\n").tolist() == [[1, 2], [3, 4]]
    tokenizer = SeriesPatchesConfig(patch=4, channels=2).build()
    with pytest.raises(UserError, match="set tokenizer.channels"):
        tokenizer.encode([np.zeros((3, 1))])
