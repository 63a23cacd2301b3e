"""Error rates counted by hand: a generator without a model that writes as told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm.data.pack.job import pack
from mm.errors import UserError
from mm.registry import TASKS
from mm.tokenizers.text.bytes import BytesConfig
from mm.vocabulary import extend_vocabulary

SAID = {"a": "one two three", "b": "four", "c": "five six"}
TOLD = {"a": "one  too three", "b": "FOUR ", "c": "five six seven"}


class Told:
    """Writes the answers in the order of the items, some as bytes."""

    def __init__(self) -> None:
        self.tokenizers: dict[str, Any] = {}

    def generate(self, prompts: list[Any], to: str, **settings: Any) -> list[Any]:
        assert to == "text" and settings["temperature"] == 0 and len(prompts) == 3
        assert settings["seed"] == 3 and settings["max_tokens"] == 9
        return [TOLD["a"], TOLD["b"].encode(), TOLD["c"]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for i, (key, text) in enumerate(SAID.items()):
        (tmp_path / "source" / "test").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "source" / "test" / f"{key}.png")
        (tmp_path / "source" / "test" / f"{key}.txt").write_text(text)
    pack(tmp_path / "source", tmp_path / "packed", progress=False)
    return tmp_path / "packed"


def test_errors_are_edits_of_words_and_of_characters(data: Path) -> None:
    task: Any = TASKS.parse(
        {"kind": "text_error", "data": str(data), "sources": ["image"], "max_tokens": 9}
    )
    found = task.evaluate(Told(), seed=3)
    assert found["image_to_text_word_error_rate"] == pytest.approx(2 / 6)  # too, seven
    assert found["image_to_text_character_error_rate"] == pytest.approx((1 + 6) / (13 + 4 + 8))
    assert found["image_to_text_exact_share"] == pytest.approx(1 / 3)
    assert found["image_to_text_n"] == 3


def test_what_it_misses_is_said_before_a_run(data: Path) -> None:
    task: Any = TASKS.parse({"kind": "text_error", "data": str(data), "sources": ["audio"]})
    words = {m: BytesConfig(modality=m).build() for m in ("audio", "text")}
    vocabulary = extend_vocabulary([t.spec for t in words.values()])
    with pytest.raises(UserError, match="no sample of split 'test' has audio and text"):
        task.check(vocabulary, words)
