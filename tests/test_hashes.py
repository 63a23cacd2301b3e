"""Saved folders name the file that was damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from generation_toys import VOCABULARY

from mm.errors import UserError
from mm.hashes import FILE, check_hashes, write_hashes
from mm.model.layer import init_weights
from mm.model.model import Model
from mm.registry import NETWORKS
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.text.bpe import BpeConfig


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a saved model and a tokenizer in it."""
    BpeConfig(vocab_size=260).fit(["the digit seven"] * 3).save(tmp_path / "tokenizer")
    torch.manual_seed(0)
    model = NETWORKS.parse({"kind": "lm", "d_model": 16}).build(VOCABULARY)
    init_weights(model)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    model.save_pretrained(tmp_path / "run/model", tokenizers={"text": tmp_path / "tokenizer"})
    return tmp_path / "run"


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocabulary.json", FILE])
def test_a_flipped_bit_of_a_saved_model_is_named_with_its_mend(run: Path, name: str) -> None:
    Model.from_pretrained(run)
    flip(run / "model" / name)
    with pytest.raises(UserError) as caught:
        Model.from_pretrained(run)
    named = "" if name == FILE else name  # a changed hash names the file that it was of
    assert str(run / "model" / named) in str(caught.value)
    assert f"remove {run / 'model'} and run: mm train {run}" in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.yaml", "words.txt"])
def test_a_flipped_bit_of_a_tokenizer_is_named(run: Path, name: str) -> None:
    tokenizer = run / "model/tokenizers/text"
    load_tokenizer(tokenizer)
    flip(tokenizer / name)
    with pytest.raises(UserError, match=f"{name}: changed or damaged.*mm tokenizer train"):
        load_tokenizer(tokenizer)


def test_a_folder_without_hashes_loads_with_one_line(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Model.from_pretrained(run)
    assert not caplog.records
    (run / "model" / FILE).unlink()
    Model.from_pretrained(run)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "saved without hashes" in line and "write_hashes" in line
    write_hashes(run / "model")
    assert check_hashes(run / "model", "")


def test_every_file_is_covered_once(run: Path) -> None:
    own = json.loads((run / "model" / FILE).read_text())["sha256"]
    assert sorted(own) == ["config.json", "model.safetensors", "vocabulary.json"]
    text = json.loads((run / "model/tokenizers/text" / FILE).read_text())["sha256"]
    assert sorted(text) == ["tokenizer.json", "tokenizer.yaml", "words.txt"]


def test_hashes_lead_to_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "a" / FILE).write_text(json.dumps({"sha256": {"../secret": "0"}}))
    with pytest.raises(UserError, match="leads out of the folder"):
        check_hashes(tmp_path / "a", "copy it again")
