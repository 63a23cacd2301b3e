"""The gate before step 1: a loss that is not on what the assistant says stops a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from chat_toys import CHATML, bpe, hf, jsonl, talk
from start_toys import files, values

from mm.config import Config
from mm.data.chat.template import FILE, JINJA, ChatTemplate
from mm.data.pack.job import pack
from mm.decoders.chat import Chat
from mm.errors import UserError
from mm.registry import TRANSFORMS
from mm.run import Run
from mm.specs import Segment, Transform
from mm.trainer.chat import check_templates
from mm.trainer.loop import train

SAVED = {"own": bpe, "chatml": lambda: hf("chatml")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of twenty talks, by this project's own tokenizer and by one that came with a model."""
    root = tmp_path_factory.mktemp("chat")
    src = jsonl(root / "talks.jsonl", [talk(i, turns=1 + i % 2) for i in range(20)])
    for name, make in SAVED.items():
        make().save(root / name / "tokenizers" / "text")
        pack(src, root / name / "tokens", tokenizers=root / name / "tokenizers", progress=False)
    return root


def a_run(root: Path, out: Path, name: str = "own", **change: Any) -> Run:
    run = values(root / name, out, **change)
    run["tokenizers"] = {"text": str(root / name / "tokenizers" / "text")}
    return Run.model_validate(run)


class Spoil(Transform):
    """Changes what is learnt of each segment of text."""

    def __init__(self, change: Callable[[np.ndarray], Any]):
        self.change = change

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        return [self._one(s) for s in segments]

    def _one(self, s: Segment) -> Segment:
        learnt = np.append(s.targets[: len(s.ids)] >= 0, len(s.targets) == len(s.ids))
        learnt = self.change(learnt)
        targets = np.where(learnt[:-1], s.ids, -1)
        return s._replace(targets=targets if learnt[-1] else np.append(targets, -1))


def without_stop(learnt: np.ndarray) -> np.ndarray:
    out = learnt.copy()
    out[np.flatnonzero(learnt & ~np.append(learnt[1:], False))] = False
    return out


def late(learnt: np.ndarray) -> np.ndarray:
    out = learnt.copy()
    for first in np.flatnonzero(learnt & ~np.append(False, learnt[:-1])):
        out[first : first + 3] = False
    return out


def early(learnt: np.ndarray) -> np.ndarray:
    out = learnt.copy()
    for first in np.flatnonzero(learnt & ~np.append(False, learnt[:-1])):
        out[first - 3 : first] = True
    return out


SPOILT: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "nothing": (np.zeros_like, "no token of it is learnt"),
    "everything": (np.ones_like, "all of its tokens are learnt, what the user says among them"),
    "the stop untrained": (without_stop, "which stops a turn, is not learnt"),
    "three tokens late": (late, "its loss begins 3 tokens after what the assistant says"),
    "three tokens early": (early, "its loss begins 3 tokens before what the assistant says"),
}


@pytest.fixture
def spoil() -> Iterator[Callable[[str], dict[str, Any]]]:
    """A transform of a stage that spoils the loss of every document."""
    chosen: list[str] = []

    class SpoilConfig(Config):
        kind: Literal["spoil"] = "spoil"

        def build(self) -> Spoil:
            return Spoil(SPOILT[chosen[-1]][0])

    TRANSFORMS.register("spoil")(SpoilConfig)

    def choose(case: str) -> dict[str, Any]:
        chosen.append(case)
        return {"transform": [{"kind": "spoil"}]}

    yield choose
    TRANSFORMS._modules.pop("spoil", None)
    TRANSFORMS._classes.pop("spoil", None)


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("case", SPOILT)
def test_a_run_is_refused_that_learns(
    case: str, name: str, root: Path, tmp_path: Path, spoil: Callable[[str], dict[str, Any]]
) -> None:
    run = a_run(root, tmp_path, name, data=spoil(case))
    with pytest.raises(UserError) as caught:
        train(run)
    said = str(caught.value)
    assert SPOILT[case][1] in said and "\n" not in said
    assert said.startswith("stages.0.data: sample 'talks-00000000' of ")
    assert "mend stages.0.data.transform" in said and "inspect" in said
    assert not files(tmp_path), "a refusal writes nothing"


def test_a_sound_run_saves_its_template_and_is_asked_through_it(root: Path, tmp_path: Path) -> None:
    for name in SAVED:
        run = a_run(root, tmp_path / name, name, steps=1)
        train(run)
        template = ChatTemplate.load(root / name / "tokens")
        assert template is not None
        assert ChatTemplate.load(run.folder) == ChatTemplate.load(run.folder / "model") == template
        chat = Chat.from_pretrained(run.folder)
        assert chat.template == template
        row = talk(3, turns=2)["messages"]
        segments = chat.segments(row[:3])
        assert [s.role for s in segments] == ["condition"] * (len(segments) - 1) + ["target"]
        said = chat.answer([row[:3], row[:1]], temperature=0, max_tokens=6)
        assert len(said) == 2 and all(template.stop not in text for text in said)
        assert said == [
            chat.answer([m], temperature=0, max_tokens=6)[0] for m in (row[:3], row[:1])
        ]


def test_a_template_that_differs_from_the_servers_stops_the_run(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text(
        CHATML.replace("\n{{ m.content }}", ": {{ m.content }}").replace(
            "assistant\n", "assistant: "
        )
    )
    tools = root / "chatml" / "tokenizers"
    pack(
        root / "talks.jsonl", tmp_path / "tokens", tokenizers=tools, template=other, progress=False
    )
    changed = {"sources": [{"path": str(tmp_path / "tokens")}]}
    with pytest.raises(UserError, match="different chat templates") as caught:
        train(a_run(root, tmp_path / "out", "chatml", data=changed))
    assert "other.jinja" in str(caught.value) and "the tokenizer at" in str(caught.value)
    assert "pack again without --template" in str(caught.value)
    both = {"sources": [{"path": str(root / "chatml" / "tokens")}, *changed["sources"]]}
    with pytest.raises(UserError, match="stages.0.data at .* and stages.0.data at .*different"):
        train(a_run(root, tmp_path / "out", "chatml", data=both))
    (tmp_path / "tokens" / FILE).unlink()
    with pytest.raises(UserError, match="chat.json is gone"):
        train(a_run(root, tmp_path / "out", "chatml", data=changed))


def test_a_run_without_the_texts_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    run = a_run(root, tmp_path).model_copy(update={"tokenizers": {}})
    with pytest.raises(UserError, match="set tokenizers.text=DIR"):
        train(run)


def test_a_tokenizer_that_brings_no_other_template_leaves_that_of_the_data(tmp_path: Path) -> None:
    """It has none, or the one that they were packed with, whose settings are then the data's."""
    ChatTemplate(source=CHATML, arguments={"enable_thinking": False}).save(tmp_path)
    shards = SimpleNamespace(says_loss=True, small_file=lambda name: tmp_path / name)
    data = SimpleNamespace(token_sources=[SimpleNamespace(path="x", build=lambda: shards)])
    run = SimpleNamespace(stages=[SimpleNamespace(data=data)], tokenizers={"text": Path("t")})
    text = hf()
    trainer: Any = SimpleNamespace(run=run, tokenizers={"text": text})
    for beside in ({}, {JINJA: CHATML.encode()}):
        text.beside = beside
        check_templates(trainer, 0)
    text.beside = {JINJA: CHATML.replace("content", "contents").encode()}
    with pytest.raises(UserError):
        check_templates(trainer, 0)
