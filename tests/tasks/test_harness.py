"""`mm eval --harness`: lm-eval over our models, held against sums by hand and our own decoding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from generation_toys import CAPTIONS, save_model
from typer.testing import CliRunner

from mm.cli.main import app
from mm.data.batching.collate import to_batch
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.specs import Segment
from mm.tasks import harness
from mm.tokenizers.text.bpe import BpeConfig


class Request(NamedTuple):
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), text=BpeConfig(vocab_size=300)) / "model"


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator.from_pretrained(folder)


def next_token(generator: Generator, ids: np.ndarray) -> torch.Tensor:
    """Log-probabilities `(L, N)` of the id at each place of a text that begins a sequence."""
    batch = to_batch([[[Segment("text", ids)]]], generator.vocabulary)
    with torch.no_grad():
        out = generator.model(batch, heads=("tokens",), loss=False)
    return out.heads["tokens"].dist.logits.double().log_softmax(-1)[: len(ids)]


def test_a_continuation_is_the_sum_of_its_tokens(generator: Generator) -> None:
    lm = harness.language_model(generator)
    pairs = [("the digit ", "seven"), ("", "three"), ("the", " digit three digit")]
    found = lm.loglikelihood([Request(p) for p in pairs])
    first = generator.vocabulary.range("text").first
    for (context, told), (nats, greedy) in zip(pairs, found, strict=True):
        whole = generator.encode("text", [context + told])[0]
        n = len(generator.encode("text", [context])[0])
        each = next_token(generator, whole)
        by_hand = sum(float(each[i, whole[i] + first]) for i in range(n, len(whole)))
        assert nats == pytest.approx(by_hand, abs=1e-5) and nats < 0
        best = all(int(each[i].argmax()) == whole[i] + first for i in range(n, len(whole)))
        assert greedy == best
    assert lm.loglikelihood([Request(("the digit ", ""))]) == [(0.0, True)], "nothing is said"


def test_what_greedy_writes_is_greedy_and_stops_where_it_is_told(generator: Generator) -> None:
    lm = harness.language_model(generator)
    text = lm.generate_until([Request(("the digit ", {"max_gen_toks": 6}))])[0]
    assert text == generator.generate(
        [{"text": "the digit "}], "text", max_tokens=6, temperature=0.0
    )[0].removeprefix("the digit ")
    assert len(text) > 2
    stop = text[2:4]
    cut = lm.generate_until([Request(("the digit ", {"max_gen_toks": 6, "until": [stop]}))])[0]
    assert cut == text[: text.find(stop)]


def test_a_long_text_is_scored_once_by_windows(generator: Generator) -> None:
    text = " ".join(CAPTIONS * 6)
    short = harness.language_model(generator, max_tokens=16)
    whole = harness.language_model(generator, max_tokens=4096)
    (one,), (other,) = (m.loglikelihood_rolling([Request((text,))]) for m in (short, whole))
    assert other == pytest.approx(whole.loglikelihood([Request(("", text))])[0][0], abs=1e-5)
    assert one != other and one == pytest.approx(other, rel=0.3), "windows see less, score all"
    (cut, _), (full, _) = (m.loglikelihood([Request((text, " seven"))])[0] for m in (short, whole))
    assert math.isfinite(cut) and cut == pytest.approx(full, rel=0.5)
    with pytest.raises(UserError, match="--max-tokens is 16"):
        short.loglikelihood([Request(("", text))])


def task_file(folder: Path) -> Path:
    rows = [{"q": "the digit ", "choices": ["seven", "xyzzy"], "answer": i % 2} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "digits_toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(task))
    return folder / "toy.yaml"


@pytest.mark.slow  # its list of tasks takes four seconds to read
def test_a_task_file_runs_by_the_command(folder: Path, tmp_path: Path) -> None:
    file, told = task_file(tmp_path), tmp_path / "told.json"
    given = ["eval", str(folder), "--harness", str(file), "--json", str(told)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    # the same choice every time, and each answer half of the time
    assert json.loads(told.read_text())["figures"]["digits_toy/acc"] == 0.5
    done = CliRunner().invoke(app, ["eval", str(folder), "--harness", "no_such_task"])
    assert isinstance(done.exception, UserError) and "no_such_task" in str(done.exception)


@pytest.mark.parametrize("text", ["- 1\n", "a: b\n"])
def test_a_file_that_is_no_task_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml: no `task:`"):
        harness._name(tmp_path / "bad.yaml")
