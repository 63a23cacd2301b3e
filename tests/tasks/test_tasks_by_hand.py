"""Figures of tasks counted by hand: a generator without a model that answers as told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tasks_learned import WORDS, Palette, make_image

from mm.cli.eval import figure_rows
from mm.data.pack.job import pack
from mm.decoders.media import save_media
from mm.errors import UserError
from mm.registry import TASKS
from mm.tasks.base import label_of, read_items
from mm.tasks.judged_generation import reconstruction_judged
from mm.tokenizers.text.bytes import BytesConfig
from mm.vocabulary import extend_vocabulary

N = {"train": 30, "val": 6, "test": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes under the column ``pattern``; captions name no class."""
    root, rng, rows = tmp_path_factory.mktemp("by_hand"), np.random.default_rng(0), []
    for split, n in N.items():
        for i in range(n):
            key = f"{split}-{i:03d}"
            save_media(make_image(i % 3, rng), root / "source" / f"{key}.png")
            row = {"key": key, "image": f"{key}.png", "split": split, "text": f"no. {i % 3}"}
            rows.append(row | {"pattern": WORDS[i % 3], "number": i % 3})
    manifest = root / "source" / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    pack(manifest, root / "packed", progress=False)
    return root / "packed"


class Answers:
    """Knows the class of an image and of a caption; hot it is wrong about every fourth item.

    ``asked``: the settings of every call.
    """

    def __init__(self) -> None:
        self.tokenizers: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.encoded: list[int] = []  # items of every call

    def tokenizer(self, modality: str) -> Any:
        return Palette() if modality == "image" else BytesConfig(modality="text").build()

    def generate(self, prompts: Sequence[Any], to: str, **settings: Any) -> list[Any]:
        self.asked.append(settings | {"n": len(prompts)})
        rng, out = np.random.default_rng(1), []
        for i, prompt in enumerate(prompts):
            (modality, value), *_ = prompt.items()
            label = self.of_image(value) if modality == "image" else int(str(value)[-1])
            if settings["temperature"] > 1 and i % 4 == 0:
                label = (label + 1) % 3
            out.append(make_image(label, rng) if to == "image" else f"a {WORDS[label]}".encode())
        return out

    @staticmethod
    def of_image(image: np.ndarray) -> int:
        dark = image[..., 0].reshape(4, 4, 4, 4).mean((1, 3)) < 125
        of_rows, of_columns = np.ptp(dark.mean(1)), np.ptp(dark.mean(0))
        return 0 if of_rows > 0.9 else 1 if of_columns > 0.9 else 2

    def encode(self, modality: str, raws: Sequence[Any]) -> list[Any]:
        self.encoded.append(len(raws))
        return list(raws)

    def decode(self, modality: str, spans: Sequence[Any]) -> list[Any]:
        return [np.full_like(span, 127) for span in spans]


def evaluate(data: Path, generator: Any = None, **values: Any) -> dict[str, Any]:
    task = TASKS.parse({"data": data, "label": "pattern"} | values).build()
    return task.evaluate(generator or Answers(), seed=5)


def test_recognition_is_counted_by_hand(data: Path) -> None:
    generator = Answers()
    figures = evaluate(
        data, generator, kind="recognition", settings=[{"temperature": 2.0}], bar=0.5, max_tokens=7
    )
    assert figures["image_to_text_accuracy"] == 9 / 12 and figures["image_to_text_n"] == 12
    assert figures["image_to_text_chance"] == pytest.approx(1 / 3)
    assert figures["image_to_text_bar"] == 0.5
    assert figures["image_to_text_classes"] == ["checks", "columns", "rows"]
    # items 0, 4 and 8 are rows, columns and checks, and are taken for the next of WORDS
    assert figures["image_to_text_confusion"] == [[3, 0, 1, 0], [1, 3, 0, 0], [0, 1, 3, 0]]
    assert generator.asked[0]["max_tokens"] == 7 and generator.asked[0]["seed"] == 5
    assert "image_to_text_tried_on_val" not in figures


class ByTurns(Answers):
    """Right but for some items of each call: a class too far, or no class at all."""

    def __init__(self, wrong: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.wrong, self.images = list(wrong), []

    def generate(self, prompts: Sequence[Any], to: str, **settings: Any) -> list[Any]:
        wrong = self.wrong.pop(0)
        self.images.append([prompt["image"] for prompt in prompts])
        says = lambda i: "?" if i == 11 else WORDS[(i + (i in wrong)) % 3]
        return [says(i) for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ([(0, 4), ()], 9),  # one against one: the item's own answer counts
        ([(0, 4), (), ()], 11),
        ([(0, 4), (1, 4), (2, 4)], 10),
    ],
)
def test_answers_to_varied_copies_vote(
    data: Path, wrong: Sequence[Sequence[int]], right: int
) -> None:
    """The last item gets no class from any view; the plain accuracy stays what it is."""
    generator = ByTurns(wrong)
    figures = evaluate(data, generator, kind="recognition", views=len(wrong))
    assert figures["image_to_text_accuracy"] == 9 / 12
    assert figures[f"image_to_text_of_{len(wrong)}_views_accuracy"] == right / 12
    first, *copies = generator.images
    for seen in copies:
        assert all(a.shape == b.shape and (a != b).any() for a, b in zip(first, seen, strict=True))
    again = ByTurns(wrong)
    evaluate(data, again, kind="recognition", views=len(wrong))
    for a, b in zip(generator.images[-1], again.images[-1], strict=True):
        assert (a == b).all(), "the same copies every time"
    (plain, views) = figure_rows({k: v for k, v in figures.items() if "confusion" not in k})
    assert views["n"] == plain["n"] == 12 and views["chance"] == plain["chance"]


def test_recognition_within_a_limit_with_classes_in_their_order(data: Path) -> None:
    figures = evaluate(data, kind="recognition", limit=4, classes=WORDS, linear_probe=True)
    assert figures["image_to_text_n"] == 4 and figures["image_to_text_accuracy"] == 1
    assert figures["image_to_text_classes"] == list(WORDS)
    assert figures["image_to_text_linear_probe_accuracy"] in (0.75, 1)
    assert "image_to_text_bar" not in figures


@pytest.mark.parametrize(
    ("kind", "name"), [("recognition", "image_to_text"), ("judged_generation", "text_to_image")]
)
def test_settings_are_chosen_by_the_accuracy_on_the_validation_split(
    data: Path, kind: str, name: str
) -> None:
    grid, generator = [{"temperature": 2.0}, {"temperature": 0.5}], Answers()
    figures = evaluate(data, generator, kind=kind, settings=grid)
    tried = figures[f"{name}_tried_on_val"]
    assert [t["accuracy"] for t in tried] == pytest.approx([4 / 6, 1])
    assert figures[f"{name}_settings"]["temperature"] == 0.5
    assert figures[f"{name}_accuracy"] == 1
    assert [(a["n"], a["temperature"]) for a in generator.asked] == [(6, 2), (6, 0.5), (12, 0.5)]


def test_judged_generation_is_counted_by_hand(data: Path) -> None:
    bars = {"bar": 0.6, "reconstruction_bar": 0.4}
    figures = evaluate(data, kind="judged_generation", settings=[{"temperature": 2.0}], **bars)
    name = "text_to_image"
    assert figures[f"{name}_accuracy"] == 9 / 12 and figures[f"{name}_n"] == 12
    assert figures[f"{name}_chance"] == pytest.approx(1 / 3)
    assert figures[f"{name}_judge_on_real_accuracy"] == 1
    assert figures[f"{name}_judge_on_reconstruction_accuracy"] == pytest.approx(1 / 3), "all gray"
    assert figures[f"{name}_bar"] == 0.6
    assert figures[f"{name}_judge_on_reconstruction_bar"] == 0.4
    assert figures[f"{name}_confusion"] == [[3, 0, 1, 0], [1, 3, 0, 0], [0, 1, 3, 0]]


def test_judged_generation_within_a_limit_and_without_reconstruction(data: Path) -> None:
    generator = Answers()
    evaluate(data, generator, kind="judged_generation", limit=5)
    assert generator.encoded == [5], "so many real items are judged"
    values = {"limit": 5, "reconstruction": False, "reconstruction_bar": 0.4, "classes": WORDS}
    figures = evaluate(data, kind="judged_generation", **values)
    assert figures["text_to_image_n"] == 5 and figures["text_to_image_accuracy"] == 1
    assert figures["text_to_image_judge_on_real_accuracy"] == 1
    assert not any("reconstruction" in name or name.endswith("bar") for name in figures)


@pytest.mark.parametrize("kind", ["recognition", "judged_generation"])
def test_numbers_name_the_classes_in_their_order(data: Path, kind: str) -> None:
    """A column of 0, 1 and 2 of rows, columns and checks."""
    figures = evaluate(data, kind=kind, label="number", classes=WORDS)
    values = {name.split("_to_")[1].split("_", 1)[1]: v for name, v in figures.items()}
    assert values["accuracy"] == 1 and set(values["classes"]) == set(WORDS)
    assert values.get("judge_on_real_accuracy", 1) == 1


def test_items_have_all_that_is_asked_for(data: Path, tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(3), []
    for i in range(4):
        save_media(make_image(i % 2, rng), tmp_path / "source" / f"{i}.png")
        text = {"text": "rows"} if i else {}
        rows.append({"key": str(i), "image": f"{i}.png", "split": "test", "label": "a"} | text)
    (tmp_path / "source" / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(tmp_path / "source" / "manifest.jsonl", tmp_path / "packed", progress=False)
    count = lambda *modalities: len(read_items(tmp_path / "packed", "test", modalities))
    assert (count("image"), count("text"), count("image", "text")) == (4, 3, 3)


def test_judges_of_other_data_and_of_few_items(data: Path, tmp_path: Path) -> None:
    """The judge and the real items are of ``judge_data``: here all of them checks or rows."""
    rng, rows = np.random.default_rng(3), []
    for i in range(24):
        key = f"{i:03d}"
        save_media(make_image(i % 2 * 2, rng), tmp_path / "source" / f"{key}.png")
        split = "train" if i < 16 else "test"
        rows.append(
            {"key": key, "image": f"{key}.png", "split": split, "pattern": WORDS[i % 2 * 2]}
        )
    (tmp_path / "source" / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(tmp_path / "source" / "manifest.jsonl", tmp_path / "packed", progress=False)
    figures = evaluate(data, kind="judged_generation", judge_data=tmp_path / "packed")
    # columns are drawn too, and this judge has no such class
    assert figures["text_to_image_accuracy"] == 8 / 12
    assert figures["text_to_image_judge_on_real_accuracy"] == 1
    with pytest.raises(UserError, match="two"):  # the first item of 16 is of one class
        evaluate(data, kind="judged_generation", judge_limit=1)


def test_round_trips_are_judged_by_hand(data: Path) -> None:
    generator: Any = Answers()
    figures = reconstruction_judged(generator, data, "image", label="pattern")
    assert figures["image_reconstruction_judged_accuracy"] == pytest.approx(1 / 3)
    assert figures["image_reconstruction_judge_on_real_accuracy"] == 1
    assert figures["image_reconstruction_chance"] == pytest.approx(1 / 3)
    assert figures["image_reconstruction_n"] == 12
    few = reconstruction_judged(generator, data, "image", label="pattern", limit=4)
    assert few["image_reconstruction_n"] == 4
    assert few["image_reconstruction_chance"] == 1 / 2, "items 0, 4, 7 and 11"


def test_tasks_ask_for_all_that_they_read(data: Path) -> None:
    """Modalities with a tokenizer, and every split that settings or a probe need."""
    tokenizers = {"text": BytesConfig(modality="text").build(), "image": Palette()}
    vocabulary = extend_vocabulary([t.spec for t in tokenizers.values()])
    two = {"settings": [{"temperature": 1.0}, {"temperature": 0.5}]}

    def refused(**values: Any) -> str:
        task = TASKS.parse({"data": data, "label": "pattern"} | values).build()
        given = values.pop("tokenizers", tokenizers)
        with pytest.raises(UserError) as told:
            task.check(vocabulary, given)
        return str(told.value)

    for kind in ("recognition", "judged_generation"):
        TASKS.parse({"kind": kind, "data": data, "label": "pattern"} | two).build().check(
            vocabulary, tokenizers
        )
        assert "no split 'dev'" in refused(kind=kind, val_split="dev", **two)
        assert "'audio'" in refused(kind=kind, sources=("audio",))
        assert "a column 'label'" in refused(kind=kind, label="label")
    TASKS.parse({"kind": "recognition", "data": data, "label": "pattern", "val_split": "dev"})
    assert "no split 'dev'" in refused(kind="recognition", linear_probe=True, train_split="dev")
    assert "no split 'dev'" in refused(kind="judged_generation", train_split="dev")
    assert "not in classes: rows; add it" in refused(kind="recognition", classes=("rows",))
    for asked in ({"source": "audio"}, {"to": "audio"}):
        assert "vocabulary has no modality 'audio'" in refused(kind="retrieval", **asked)
    bits = TASKS.parse({"kind": "bits_per_byte", "data": data, "given": {"text": "image"}}).build()
    with pytest.raises(UserError, match=r"set tokenizers\.image"):
        bits.check(vocabulary, {"text": tokenizers["text"]})
    for free in ("none", "null"):  # no modalities: nothing is encoded
        given = {"kind": "bits_per_byte", "data": data, "given": {"text": free}}
        TASKS.parse(given).build().check(vocabulary, tokenizers)


def test_a_number_is_a_place_in_the_classes_where_there_is_one() -> None:
    class Shards:
        def __init__(self, value: Any):
            self.value = value

        def meta(self, i: int) -> dict[str, Any]:
            return {"label": self.value}

        def raw(self, i: int, modality: str) -> None:
            return None

    of = lambda value: label_of(Shards(value), 0, ("zero", "one"))
    assert [of(0), of(1), of(2), of(-1), of(True)] == ["zero", "one", "2", "-1", None]
