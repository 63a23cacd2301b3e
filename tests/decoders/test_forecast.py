"""How a series goes on, and conditions in a second sequence: by what a user types."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.cli import main as cli
from mm.data.batching.collate import to_batch
from mm.data.modalities.base import BadSample, get_modality
from mm.data.pack.job import pack
from mm.decoders.forecast import QUANTILES, continue_series, forecast, write_forecast
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.reading import parse_json
from mm.run import Run
from mm.specs import Segment
from mm.tokenizers.series.patches import SeriesPatchesConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.loop import train

PERIOD = 8


def wave(n: int, start: int = 0) -> np.ndarray:
    """Two sines, of which the faster one tells ``start % 4`` in every patch of four."""
    turns = 2 * np.pi * (np.arange(n) + start) / PERIOD
    return 100 + 10 * np.sin(turns) + 8 * np.sin(2 * turns)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forecast")
    source = root / "source" / "train"
    source.mkdir(parents=True)
    for i in range(24):
        rows = "".join(f"{v:.3f}\n" for v in wave(32, i))
        (source / f"{i:02d}.series").write_text(rows)
        (source / f"{i:02d}.txt").write_text(f"p{i % 4}")
    series = SeriesPatchesConfig(patch=4, channels=1, norm_points=8).build()
    tokenizers = {"time_series": series, "text": BytesConfig(modality="text").build()}
    for name, tokenizer in tokenizers.items():
        tokenizer.save(root / "tokenizers" / name)
    pack(root / "source", root / "tokens", tokenizers=tokenizers, progress=False)
    return root


def trained(data: Path, name: str, tasks: Mapping[str, float], **change: Any) -> Path:
    transform: list[Any] = [{"kind": "any_to_any", "tasks": tasks, "condition_dropout": 0.1}]
    transform += change.pop("transform", [])
    model: dict[str, Any] = {
        "kind": "lm",
        "d_model": 32,
        "adapters": {"time_series": {"kind": "linear", "d_in": 4}},
        "backbone": {"kind": "stack", "depth": 2, "pattern": "attention"},
        "heads": {"tokens": "softmax", "time_series": {"kind": "mixture", "d_out": 4}},
    } | change.pop("model", {})
    stream = {"kind": "packed", "sources": [{"path": str(data / "tokens")}], "seq_len": 64,
              "batch_size": 4, "max_documents": 8, "transform": transform}  # fmt: skip
    run = Run.model_validate(
        {
            "name": name,
            "out": data / "runs",
            "vocabulary": data / "tokens" / "vocabulary.json",
            "tokenizers": {m: data / "tokenizers" / m for m in ("time_series", "text")},
            "model": model,
            "stages": [
                {
                    "data": stream,
                    "objective": "next_token",
                    "budget": {"steps": change.pop("steps")},
                    "optimizer": {"kind": "adamw", "lr": 1e-2},
                }
            ],
            "engine": {"precision": "fp32", "zero_stage": 0},
        }
    )
    train(run)
    return run.folder


@pytest.fixture(scope="module")
def told(data: Path) -> Path:
    return trained(data, "told", {"time_series": 1.0, "text>time_series": 1.0}, steps=90)


def call(*words: str | Path) -> int:
    return cli.run([str(word) for word in words])


def test_a_series_goes_on_as_a_table_and_a_picture(told: Path, tmp_path: Path) -> None:
    past = tmp_path / "past.csv"
    past.write_text("demand\n" + "".join(f"{v:.3f}\n" for v in wave(24)))
    out, said = tmp_path / "new" / "ahead.csv", tmp_path / "said.json"
    words = ["generate", told, "--time-series", past, "--to", "time_series", "--horizon", "10"]
    assert call(*words, "-n", "64", "-o", out, "--json", said) == 0
    rows = list(csv.DictReader(out.open()))
    assert [int(row["point"]) for row in rows] == [*range(24, 34)]
    names = [f"q{q:g}" for q in QUANTILES]
    between = np.array([[float(row[name]) for name in names] for row in rows])
    assert (np.diff(between, axis=1) >= 0).all() and (between[:, -1] > between[:, 0]).all()
    # What it trained on is known: far nearer than the mean, whose error is 6.7.
    assert np.abs(between[:, 2] - wave(10, 24)).mean() < 3
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width > 500 and len(set(picture.convert("L").get_flattened_data())) > 10
    outputs = parse_json(said.read_bytes())["outputs"]
    assert outputs[0]["what"] == "10 points after 24, 64 continuations"
    again = tmp_path / "again.csv"
    assert call(*words, "-n", "64", "-o", again) == 0 and again.read_text() == out.read_text()
    assert call(*words, "-o", again, "--temperature", "0", "--prompt", "p0") == 0
    one = list(csv.DictReader(again.open()))
    assert all(row["q0.05"] == row["mean"] == row["q0.95"] for row in one)


def test_what_cannot_be_told_is_one_line(
    told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    past = tmp_path / "past.csv"
    past.write_text("1\n2\n")
    to = ["generate", told, "--to", "time_series"]
    for words, why in (
        ([*to, "--time-series", past], "name it with -o FILE.csv"),
        ([*to, "--time-series", past, "-o", tmp_path / "x" / "a.png"], "is written as .csv"),
        ([*to, "-o", tmp_path / "a.csv"], "goes on with a series: give one, --time-series FILE"),
        (["generate", told, "--to", "text", "--horizon", "3"], "--horizon: of series alone"),
        ([*to, "--time-series", past, "--top-k", "3"], "--top-k is of ids; a series takes"),
    ):
        assert call(*words) == 2, words
        assert why in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["past.csv"]
    past.write_text("1\na\n")
    assert call(*to, "--time-series", past, "-o", tmp_path / "a.csv") == 2
    assert "line 2 is not numbers" in capsys.readouterr().err


def test_names_of_columns_are_no_point() -> None:
    modality = get_modality("time_series")
    assert modality.decode(b"a,b\n1,2\n3,4\n").tolist() == [[1, 2], [3, 4]]
    for bad in (b"2020-01-01 1\n1 2\n", b"a,b\n", b"a\nb\n1\n"):
        with pytest.raises(BadSample):
            modality.decode(bad)


def test_channels_have_rows_and_panels(tmp_path: Path) -> None:
    draws = np.stack([np.full((3, 2), x, np.float32) for x in range(11)])
    file, picture = write_forecast(np.zeros((5, 2), np.float32), draws, tmp_path / "two")
    rows = list(csv.DictReader(file.open()))
    assert [(row["point"], row["channel"]) for row in rows[:3]] == [
        ("5", "0"), ("5", "1"), ("6", "0"),
    ]  # fmt: skip
    assert {row["q0.5"] for row in rows} == {"5"} and {row["q0.95"] for row in rows} == {"9.5"}
    assert picture.suffix == ".png" and picture.is_file()


def test_conditions_of_a_series_are_read(told: Path) -> None:
    generator = Generator.from_pretrained(told)
    past = wave(12)
    one, other = (
        forecast(generator, {"text": p, "time_series": past}, "time_series", 8, temperature=0)[1]
        for p in ("p0", "p2")
    )
    assert one.shape == (1, 8, 1) and not np.array_equal(one, other)


SECOND: dict[str, Any] = {
    "parts": ["source"],
    "backbone": {"kind": "stack", "depth": 2, "pattern": "attention cross_attention"},
}


@pytest.mark.parametrize("modalities", [None, ["time_series"]])
def test_conditions_stand_where_the_model_was_trained_to_read_them(
    data: Path, modalities: list[str] | None
) -> None:
    """The text after a series in the second sequence: step by step as in one whole pass."""
    part = {"kind": "to_part"} | ({"modalities": modalities} if modalities else {})
    name = f"second{len(modalities or ())}"
    tasks = {"time_series>text": 1.0} | ({"text": 0.2} if modalities is None else {})
    folder = trained(data, name, tasks, transform=[part], model=SECOND, steps=90)
    generator = Generator.from_pretrained(folder)
    (asked,) = generator.segments([{"time_series": wave(32, 3)}], "text")
    assert [s.part for s in asked] == ["source"]
    series = [{"time_series": wave(32, i)} for i in range(8)]
    said = generator.generate(series, "text", temperature=0)
    assert sum(s == b"p%d" % (i % 4) for i, s in enumerate(said)) >= 6, said
    # The reference: the whole document at once, its condition in the part.
    ids = np.frombuffer(said[3], np.uint8).astype(np.int32)
    batch = to_batch([[[*asked, Segment("text", ids)]]], generator.vocabulary)
    with torch.no_grad():
        logits = generator.model(batch, heads=("tokens",), loss=False).heads["tokens"].dist.logits
    range_ = generator.vocabulary.range("text")
    assert (logits.argmax(-1)[: len(ids)] - range_.first).tolist() == ids.tolist()
    if modalities is None:
        (empty,) = generator.segments([{}], "text")
        assert [(s.modality, s.part, s.ids) for s in empty] == [("text", "source", None)]
        assert generator.generate([{}, {"time_series": wave(32)}], "text", cfg_scale=1.5)


def test_several_second_sequences_must_be_named(told: Path) -> None:
    generator = Generator.from_pretrained(told)
    model: Any = generator.model
    model.config = model.config.model_copy(update={"parts": ("a", "b")})
    with pytest.raises(UserError, match=r"reads 2 second sequences \(a, b\)"):
        generator.segments([{"text": "p1"}], "text")


def test_a_model_that_only_reads_values_says_so(told: Path) -> None:
    generator = Generator.from_pretrained(told)
    model: Any = generator.model
    del model.heads["time_series"]
    with pytest.raises(UserError, match="cannot write 'time_series'"):
        continue_series(
            model, generator.vocabulary, generator.tokenizer("time_series"), [wave(8)], 4
        )
