"""What `mm init` sees in real files, and what it chooses: configs that load, paths that exist."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import yaml
from own_files import PHOTOS, WORDS, book, photographs, recordings
from PIL import Image

from mm.cli import main as cli
from mm.cli.schema import resolve
from mm.config import validate
from mm.data.pack.config import PackConfig
from mm.errors import UserError
from mm.own_data import pictures
from mm.own_data.choose import Options, choose
from mm.own_data.look import Found, look, one_word
from mm.own_data.plan import Chosen, Plan, flow, plain, to_yaml
from mm.own_data.tokenizers import TokenizerPlan
from mm.own_data.write import write
from mm.run import Run
from mm.tasks.base import conditions, read_items
from mm.tasks.check import require_items


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    root = tmp_path_factory.mktemp("own")
    return {
        "photographs": look(photographs(root / "photos", 30)),
        "recordings": look(recordings(root / "speech")),
        "book": look(book(root)),
    }


def plan_of(found: Found, out: Path, **options: Any) -> Plan:
    return choose(found, Options(out, **options), lambda *_: 0.5)


@pytest.mark.parametrize("name", ["photographs", "recordings", "book"])
def test_every_config_loads_and_every_command_parses(
    name: str, seen: dict[str, Found], tmp_path: Path
) -> None:
    plan = plan_of(seen[name], tmp_path)
    written = write(plan, tmp_path, "mm init x")
    for file in written.new:
        if file.suffix == ".yaml":
            resolve(str(file), [])
    app: Any = typer.main.get_command(cli.app)
    for step in plan.steps:
        command, words = app, list(step.words)
        context = app.make_context("mm", list(words))
        while hasattr(command, "get_command"):
            word = words.pop(0)
            command = command.get_command(context, word)
        command.make_context(word, words, parent=context)
    train = validate(Run, plain(plan.configs["train.yaml"]), "train")
    paths = [*train.tokenizers.values(), train.vocabulary, train.folder]
    assert all(path and path.is_relative_to(tmp_path) for path in paths)


def test_photographs(seen: dict[str, Found], tmp_path: Path) -> None:
    plan = plan_of(seen["photographs"], tmp_path)
    image, train = plain(plan.configs["tokenizer-image.yaml"]), plain(plan.configs["train.yaml"])
    assert (image["model"]["channels"], image["model"]["size"]) == (3, 32)
    assert not image["stages"][0]["data"]["gray"]
    assert train["model"]["embedder"]["position"]["kind"] == "grid"
    stage = train["stages"][0]
    assert stage["objective"]["transform"]["tasks"].keys() == {"pixels>text", "text>image"}
    assert "ema" in stage and train["model"]["mask"] == "prefix"
    (change,) = stage["data"]["transform"]
    assert (change["modality"], change["mirror"], change["shift"]) == ("pixels", 0.5, 4)
    (task,) = [t for t in stage["tasks"] if t["kind"] == "recognition"]
    assert task["classes"] == list(PHOTOS) and task["linear_probe"] and task["split"] == "val"
    assert task["sources"] == ["pixels"] and task["views"] == 8
    assert "--copies 16" in plan.steps[-4].line  # 60 photographs are few
    prompts = train["callbacks"][1]["prompts"]
    assert {"text": "china", "to": "image"} in prompts
    files = [Path(prompt["pixels"]) for prompt in prompts if "pixels" in prompt]
    assert files and all(file.is_file() for file in files)


def test_pictures_are_read_as_values_where_they_are_few(
    seen: dict[str, Found], tmp_path: Path
) -> None:
    plan = plan_of(seen["photographs"], tmp_path, image_size=64)
    tokenizer = plain(plan.configs["tokenizer-pixels.yaml"])["tokenizer"]
    assert tokenizer["size"] == 64 and tokenizer["modality"] == "pixels"
    adapter = plain(plan.configs["train.yaml"])["model"]["adapters"]["pixels"]
    assert adapter["patch"] == tokenizer["patch"]
    assert not any("eval" in s.words and str(tmp_path / "tokenizers/pixels") in s.words
                   for s in plan.steps)  # fmt: skip
    many = seen["photographs"]._replace(keys=tuple(str(i) for i in range(20_000)))
    plan = plan_of(many, tmp_path)
    assert "tokenizer-pixels.yaml" not in plan.configs
    stage = plain(plan.configs["train.yaml"])["stages"][0]
    assert stage["objective"]["transform"]["tasks"].keys() == {"image>text", "text>image"}


def test_gray_pictures_of_classes_are_not_mirrored(tmp_path: Path) -> None:
    for file in sorted(photographs(tmp_path / "a", 30).glob("*.png")):
        Image.open(file).convert("L").save(file)
    stage = plain(plan_of(look(tmp_path / "a"), tmp_path).configs["train.yaml"])["stages"][0]
    (change,) = stage["data"]["transform"]
    assert change["mirror"] == 0 and change["shift"] == 1


def test_varied_copies_vote_where_that_takes_seconds(seen: dict[str, Found]) -> None:
    photos = seen["photographs"]
    assert pictures.views(photos._replace(splits={"test": 1000}), "test", 0.0) is not None
    assert pictures.views(photos._replace(splits={"test": 1001}), "test", 0.0) is None
    held_out = photos.held_out(0.5)
    assert held_out > 5 and pictures.views(photos, "val", 0.5) is not None
    training_keys = tuple(str(i) for i in range(4000))
    assert pictures.views(photos._replace(keys=training_keys), "val", 0.5) is None


def test_many_pictures_and_recordings_keep_the_larger_model(seen: dict[str, Found]) -> None:
    photos = seen["photographs"]
    assert pictures.few_pictures(photos, 7999) and not pictures.few_pictures(photos, 8000)
    assert not pictures.few_pictures(photos._replace(classes=None), 60)
    assert not pictures.few_pictures(seen["recordings"], 18)
    assert not pictures.few_pictures(seen["book"], 60)


def test_the_time_is_told(seen: dict[str, Found], tmp_path: Path) -> None:
    told = {str(note.value): note.why for note in plan_of(seen["book"], tmp_path).notes}
    steps = plan_of(seen["book"], tmp_path).configs["train.yaml"]["stages"][0]["budget"]["steps"]
    assert f"backbone {steps.value * 0.5 / 60:.1f}" in told["time"]


def test_prompts_are_files_that_pack_holds_out(seen: dict[str, Found], tmp_path: Path) -> None:
    import mm
    from mm.data.shards.reader import ShardSet

    found = seen["photographs"]
    words = plan_of(found, tmp_path).steps[0].words
    mm.pack(found.src, tmp_path / "data", val_share=float(words[words.index("--val-share") + 1]))
    val = ShardSet.open(tmp_path / "data", "val")
    assert len(val) == found.held_out(0.1)
    keys = {val.key(i) for i in range(len(val))}
    assert {f.stem for f in found.held_out_files("image", "val", 0.1)} == keys


def test_pixels_are_measured_on_the_pictures_that_they_are_made_from(tmp_path: Path) -> None:
    import mm

    mm.pack(photographs(tmp_path / "photos", 10), tmp_path / "data", val_share=0.3)
    given: Any = {"classes": PHOTOS}
    items = read_items(tmp_path / "data", "val", ("pixels",), **given)
    codes = read_items(tmp_path / "data", "val", ("image",), **given)
    assert len(items) > 2 and [i.label for i in items] == [i.label for i in codes]
    for item, same in zip(items, codes, strict=True):
        prompt = conditions(item, ("pixels",))
        assert prompt.keys() == {"pixels"}
        assert np.array_equal(prompt["pixels"], conditions(same, ("image",))["image"])
    require_items(tmp_path / "data", "val", ("pixels",), PHOTOS, "label")
    with pytest.raises(UserError, match="no sample of split 'val' has audio"):
        require_items(tmp_path / "data", "val", ("audio",), PHOTOS, "label")


def test_gray_and_large_pictures(tmp_path: Path) -> None:
    for i, file in enumerate(sorted(photographs(tmp_path / "a", 6, side=200).glob("*.png"))):
        Image.open(file).convert("L").save(tmp_path / "a" / f"{file.stem}.png")
        (tmp_path / "a" / f"{file.stem}.txt").write_text(f"picture {i} of a place")
    plan = plan_of(look(tmp_path / "a"), tmp_path / "out")
    image = plain(plan.configs["tokenizer-image.yaml"])
    assert image["model"]["channels"] == 1 and image["stages"][0]["data"]["gray"]
    assert image["model"]["size"] == 64 and image["model"]["down"] == [8]
    tasks = plain(plan.configs["train.yaml"])["stages"][0]["tasks"]
    assert [task["kind"] for task in tasks] == ["bits_per_byte"]  # captions are no classes


def test_recordings(seen: dict[str, Found], tmp_path: Path) -> None:
    plan = plan_of(seen["recordings"], tmp_path)
    stage = plain(plan.configs["train.yaml"])["stages"][0]
    (task,) = [t for t in stage["tasks"] if t["kind"] == "recognition"]
    assert task["classes"] == sorted(WORDS) and task["split"] == "test"
    assert task["sources"] == ["audio"] and "linear_probe" not in task


def test_a_book_in_bytes_loses_nothing(seen: dict[str, Found], tmp_path: Path) -> None:
    plan = plan_of(seen["book"], tmp_path)
    assert plain(plan.configs["tokenizer-bytes.yaml"])["tokenizer"]["kind"] == "bytes"
    stage = plain(plan.configs["train.yaml"])["stages"][0]
    assert stage["data"]["cut"] and stage["data"]["seq_len"] == 512
    assert [task["kind"] for task in stage["tasks"]] == ["bits_per_byte"]
    bpe = plan_of(seen["book"], tmp_path, text="bpe")
    assert "tokenizer-text.yaml" in bpe.configs


def test_a_folder_with_one_text_is_that_text(seen: dict[str, Found], tmp_path: Path) -> None:
    """A folder's file is one document: nothing of it could be held out."""
    text = book(tmp_path / "plays")
    (tmp_path / "plays" / ".DS_Store").write_bytes(b"x")
    found = look(tmp_path / "plays")
    assert found == seen["book"]._replace(src=text) and found.samples > 1
    assert plan_of(found, tmp_path / "out").steps[0].words[2] == str(text)
    (tmp_path / "plays" / "more.txt").write_text("more")
    assert look(tmp_path / "plays").src == tmp_path / "plays"


def test_the_budget_is_time_or_data(seen: dict[str, Found], tmp_path: Path) -> None:
    steps = lambda plan: plan.configs["train.yaml"]["stages"][0]["budget"]["steps"]
    short = steps(plan_of(seen["book"], tmp_path, minutes=1.0))
    assert 20 <= short.value <= 60 / 0.5 and "fits the time" in short.why
    long = steps(plan_of(seen["book"], tmp_path, minutes=600.0))
    assert "8 passes over the data" in long.why and long.value < 200


def test_a_class_word_has_the_ids_that_words_have_not_those_of_the_longest() -> None:
    ids = (("text", 12, 4.6), ("image", 66, 66), ("pixels", 18, 18))
    plans = [TokenizerPlan(m, {}, longest, mean, 0, 0) for m, longest, mean in ids]
    assert pictures.lengths(plans) == (23, 71)
    assert pictures.mean_ids(plans) == pytest.approx(0.85 * 23 + 0.15 * 71)


def test_folders_and_file_names_say_the_class(tmp_path: Path) -> None:
    for file in photographs(tmp_path / "named", 6).glob("*.txt"):
        file.unlink()
    named = look(tmp_path / "named")
    assert named.classes is not None and named.classes.words == PHOTOS
    assert "--caption-regex" in plan_of(named, tmp_path / "out").steps[0].words
    for file in (tmp_path / "named").glob("*.png"):
        (tmp_path / "sorted" / file.stem.split("_")[0]).mkdir(parents=True, exist_ok=True)
        file.rename(tmp_path / "sorted" / file.stem.split("_")[0] / f"IMG_{file.stem[-3:]}.png")
    found = look(tmp_path / "sorted")
    assert found.classes is not None and found.classes.words == PHOTOS
    plan = plan_of(found, tmp_path / "out")
    assert ("--caption-from", "parent") == plan.steps[0].words[5:7]
    words = list(plan.steps[0].words)
    given = {"src": found.src, "out": tmp_path / "data", "caption_from": "parent"}
    assert validate(PackConfig, given, "test") and words[-2] == "--val-share"


def test_one_word_of_a_caption_is_a_class() -> None:
    assert one_word(["a photo of a cat", "the cat", "a dog", "big dog"] * 5) == ("cat", "dog")
    assert one_word(["cat", "dog"] * 5) == ()  # the caption itself


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="1 samples .* too few"):
        plan_of(look(tmp_path), tmp_path / "out")


def test_yaml_holds_the_values_and_every_reason(seen: dict[str, Found], tmp_path: Path) -> None:
    plan = plan_of(seen["photographs"], tmp_path)
    for values in plan.configs.values():
        text = to_yaml(values, "head")
        assert yaml.safe_load(text) == plain(values) and text.startswith("# head\n")
    text = to_yaml(plan.configs["train.yaml"], "head")
    reasons = [why for file, _, _, why in plan.rows() if file == "train.yaml"]
    assert len(reasons) > 8 and all(why in text for why in reasons)
    nested = {"a": [{"b": Chosen("x: y", "why"), "c": [1, {"d": None}]}, {}], "e": Chosen([], "no")}
    assert yaml.safe_load(to_yaml(nested, "")) == plain(nested)
    lines = [{"bytes": "ROMEO:\n"}, "true", "ü\n\n"]  # prompts of plays
    assert flow(lines) == '[{bytes: "ROMEO:\\n"}, \'true\', "ü\\n\\n"]'
    assert yaml.safe_load(flow(lines)) == lines


def test_what_was_edited_is_kept(seen: dict[str, Found], tmp_path: Path) -> None:
    plan, command = plan_of(seen["book"], tmp_path), shlex.join(["mm", "init", "a b"])
    assert len(write(plan, tmp_path, command).new) == 3
    file = tmp_path / "train.yaml"
    file.write_text(file.read_text() + "seed: 3\n")
    written = write(plan, tmp_path, command)
    assert not written.new and file in written.kept and file.read_text().endswith("seed: 3\n")
    with pytest.raises(UserError, match=r"written by: mm init 'a b'.*--force"):
        write(plan, tmp_path, "mm init other")
    write(plan, tmp_path, "mm init other", force=True)
    assert "seed: 3" not in file.read_text() and "mm init other" in file.read_text()
