"""`mm finetune`: the user's files and a trained model in, a tuned one and a comparison out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_toys import call, text_base
from PIL import Image

from mm.errors import UserError
from mm.finetune import fit
from mm.finetune.base import Base, open_base
from mm.finetune.choose import keep_reasons
from mm.finetune.data import read_data
from mm.finetune.method import candidates
from mm.own_data.plan import Chosen, plain
from mm.plan.gpus import find
from mm.plan.plan import Cluster, make_plan
from mm.report.build import build_report
from mm.report.comparison import comparison
from mm.report.read import read_run
from mm.specs import TokenSpec
from mm.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
STEPS = "stages.0.budget.steps=12"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text_base")
    (root / "book.txt").write_text((ROOT / "LICENSE").read_text()[:20_000])
    return text_base(root, root / "book.txt")


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README learnt, by adapters, as nothing else is said."""
    root = tmp_path_factory.mktemp("tuned")
    (root / "mine.txt").write_text((ROOT / "README.md").read_text() * 2)
    out = root / "run"
    words = ("--model", base, "--data", root / "mine.txt", "--out", out, STEPS)
    assert call("finetune", *words, "tracking.sinks=[]") == 0
    return out


def test_both_models_are_measured_on_both_data(tuned: Path) -> None:
    found = json.loads((tuned / "comparison.json").read_text())
    of = {row["of"]: row for row in found["rows"]}
    assert of.keys() == {"own", "base"}
    assert of["own"]["name"] == of["base"]["name"] == "bytes_bits_per_byte"
    assert of["own"]["tuned"] < of["own"]["base"] < of["own"]["chance"]
    cost = found["cost"]
    assert 0 < cost["trained_parameters"] < 0.2 * cost["parameters"]
    assert cost["steps"] == 12 and cost["tokens"] > 1000 and cost["peak_memory_mib"] > 50


def test_the_yaml_says_what_ran_and_why(tuned: Path) -> None:
    text = (tuned / "finetune.yaml").read_text()
    values = yaml.safe_load(text)
    assert values["model"]["linear"]["kind"] == "lora" and values["export"] == "best"
    assert "adapters forget less" in text and "steps: 12  # as you said" in text
    weights = [s["weight"] for s in values["stages"][0]["data"]["sources"]]
    assert weights == [0.5, 0.5]  # the base's own data, in part
    ran = yaml.safe_load((tuned / "config.yaml").read_text())
    assert ran["stages"][0]["budget"]["steps"] == 12
    assert (tuned / "adapters.safetensors").is_file()


def test_the_report_shows_before_and_after(tuned: Path) -> None:
    text = build_report(tuned).read_text()
    assert '<section id="comparison">' in text and "Data of the base" in text
    assert "step 0" in text  # what the base made of the prompts, beside


def test_a_figure_that_should_fall_is_better_where_it_fell(tmp_path: Path) -> None:
    same = {"of": "own", "base": 2.0, "tuned": 1.0}
    names = ("text_perplexity", "bytes_bits_per_byte", "audio_to_text_word_error_rate", "accuracy")
    rows = [{"name": name, **same} for name in names]
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": rows, "cost": {}}))
    shown = comparison(read_run(tmp_path))
    assert shown.count(">better<") == 3 and shown.count(">worse<") == 1


def test_the_same_command_again_does_nothing_new(
    tuned: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (tuned / "model" / "model.safetensors").read_bytes()
    words = ("--model", base, "--data", tuned.parent / "mine.txt", "--out", tuned, STEPS)
    assert call("finetune", *words, "tracking.sinks=[]") == 0
    assert capsys.readouterr().out.count("done already") == 4  # train, both evals, report
    assert (tuned / "model" / "model.safetensors").read_bytes() == weights
    assert call("finetune", *words, "seed=7") == 2
    assert "go on with that command, or name another folder" in capsys.readouterr().err


def test_an_unknown_modality_names_the_recipe(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(pictures / f"a{i}.png")
    out = tmp_path / "run"
    assert call("finetune", "--model", base, "--data", pictures, "--out", out) == 2
    error = capsys.readouterr().err.strip()
    assert "has 'image', which" in error and "\n" not in error
    recipe = error.rpartition("recipe ")[2]
    assert (ROOT / recipe).is_file() and not out.exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (("--method", "prefix"), "--method prefix: give auto, full, lora, qlora"),
        (("--model", "nowhere"), "--model nowhere: no such folder"),
        (("--data", "nowhere"), "nowhere: no such data"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Any, told: str
) -> None:
    (tmp_path / "mine.txt").write_text("some words " * 400)
    given = ["--model", base, "--data", tmp_path / "mine.txt", "--out", tmp_path / "run"]
    assert call("finetune", *given, *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_reasons_stay_where_nothing_changed() -> None:
    old = {"a": Chosen(1, "why"), "b": {"c": Chosen({"d": 2}, "so"), "e": 3}}
    assert keep_reasons(old, plain(old)) == old
    new = keep_reasons(old, {"a": 5, "b": {"c": {"d": 4}, "e": 3}, "f": 6})
    assert new["a"] == Chosen(5, "as you said") and new["f"] == Chosen(6, "as you said")
    assert new["b"]["e"] == 3 and plain(new["b"]["c"]) == {"d": 4}


def test_what_the_bases_codes_keep_of_pictures_is_measured_after_packing(tmp_path: Path) -> None:
    for i in range(24):
        of = tmp_path / "mine" / ("cat", "dog")[i % 2]
        of.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(of / f"{i}.png")
    specs = (
        TokenSpec("text", 300, fingerprint="t"),
        TokenSpec("image", 64, fingerprint="i"),
        TokenSpec("pixels", 0, continuous=True, n_features=12, fingerprint="p"),
    )
    folders = {spec.modality: tmp_path for spec in specs}
    base = Base(tmp_path, tmp_path / "model", {}, Vocabulary(specs), folders, 1, None)
    steps = read_data(tmp_path / "mine", base, tmp_path / "run").steps
    kinds = [step.words[:2] for step in steps]
    assert kinds == [("data", "pack"), ("data", "pack"), ("tokenizer", "eval")]
    words = list(steps[-1].words)
    assert words[2] == str(tmp_path / "model" / "tokenizers" / "image")
    assert words[words.index("--out") + 1] == str(
        tmp_path / "run" / "tokenizers" / "image" / "eval"
    )


def test_token_loss_is_the_perplexity_of_the_shards(base: Path) -> None:
    from mm.decoders.generate import Generator
    from mm.registry import TASKS

    task: Any = TASKS.parse({"kind": "token_loss", "data": str(base.parent / "tokens")})
    generator = Generator.from_pretrained(base)
    found = task.evaluate(generator)
    assert 1 < found["bytes_perplexity"] < found["bytes_perplexity_chance"] == 257
    assert found["bytes_perplexity_n"] > 1000
    raw: Any = TASKS.parse({"kind": "token_loss", "data": str(base.parent / "data")})
    with pytest.raises(UserError, match="reads token shards"):
        raw.check(generator.vocabulary, generator.tokenizers)


@pytest.mark.slow
def test_minutes_and_what_fits_decide_steps_and_method(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = candidates(open_base(base), 100, "auto")
    assert [how.name for how in methods] == ["lora", "qlora"]
    monkeypatch.setattr(fit, "this_device", lambda: find("cpu"))
    made = yaml.safe_load((base / "config.yaml").read_text())
    stage = made["stages"][0] | {"budget": {"steps": 900}, "tasks": []}

    def config_of(how: Any) -> Any:
        model = made["model"] | {"linear": plain(how.model["linear"])}
        return made | {"model": model, "stages": [stage]}, 100

    for minutes, changes, steps in (
        (1e6, [], 900),
        (1e-6, [], fit.LEAST_STEPS),  # however fast a step is here
        (1e-6, ["stages.0.budget.steps=900"], 900),
    ):
        config, notes = fit.fit_device(methods, config_of, minutes, changes)
        assert notes[0].why.startswith("lora:")
        assert plain(config["stages"][0]["budget"]["steps"]) == steps


@pytest.mark.slow
def test_four_bits_are_taken_where_adapters_alone_do_not_fit(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that weights of 32 bits fill, for a base of 512 channels."""
    methods = candidates(open_base(base), 100, "auto")
    made = yaml.safe_load((base / "config.yaml").read_text())
    stage = made["stages"][0] | {"budget": {"steps": 20}, "tasks": []}
    stage["data"]["batch_size"] = 1
    measured = find("cpu")

    def config_of(how: Any) -> Any:
        wide = {"d_model": 512, "backbone": {"kind": "stack", "pattern": "2*attention"}}
        model = made["model"] | wide | {"linear": plain(how.model["linear"])}
        return made | {"model": model, "stages": [stage]}, 100

    def chosen(memory: float) -> tuple[str, Any]:
        small = dataclasses.replace(measured, memory=int(memory))
        monkeypatch.setattr(fit, "this_device", lambda: small)
        config, notes = fit.fit_device(methods, config_of, 10.0, [])
        return notes[0].why, plain(config["model"])["linear"].get("base_layer")

    why, below = chosen(64e9)
    assert why.startswith("lora: 100 ids for") and below is None
    large = Cluster(dataclasses.replace(measured, memory=64 * 10**9), 1, 1)
    four_bits = make_plan(fit.run_of(config_of(methods[1])[0]), large, longest=False)
    why, below = chosen(1.1 * four_bits["memory"]["total_bytes"])
    assert why == "qlora: the method before it does not fit this device"
    assert below == {"kind": "nf4", "double": True}
