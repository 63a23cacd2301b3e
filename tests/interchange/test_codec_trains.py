"""An imported codec in the rest of the stack: its ids train a model, and it is trained further."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from data_toys import wav
from hf_codecs import RATE, codec

from mm.cli import main as cli
from mm.tokenizers.load import load_tokenizer

BOOKS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mimi as a tokenizer, recordings, and these as its ids."""
    root = tmp_path_factory.mktemp("codec")
    codec(root / "theirs", "mimi")
    (root / "wav").mkdir()
    for i in range(6):
        (root / "wav" / f"{i}.wav").write_bytes(wav(i))
    out = root / "tokenizers" / "audio"
    books = ["--books", str(BOOKS), "--json", str(root / "found.json")]
    assert cli.run(["import", str(root / "theirs"), "--out", str(out), *books]) == 0
    found = json.loads((root / "found.json").read_text())["check"]
    assert found["different"] == 0 and found["codes"] > 100
    sound, ids = ["data", "pack", str(root / "wav")], ["data", "pack", str(root / "sounds")]
    assert cli.run([*sound, "--out", str(root / "sounds"), "--split", "train"]) == 0
    ids += ["--tokenizers", str(root / "tokenizers")]
    assert cli.run([*ids, "--out", str(root / "tokens")]) == 0
    return root


def write(path: Path, run: dict) -> Path:
    path.write_text(yaml.safe_dump({"out": str(path.parent), "callbacks": [], **run}))
    return path


@pytest.mark.slow
def test_a_model_trains_on_its_ids_and_makes_sound_of_them(folder: Path) -> None:
    run = {
        "name": "lm",
        "vocabulary": str(folder / "tokens" / "vocabulary.json"),
        "tokenizers": {"audio": str(folder / "tokenizers" / "audio")},
        "model": {"kind": "lm", "d_model": 32, "backbone": {"kind": "stack", "depth": 1}},
        "stages": [
            {
                "data": {
                    "kind": "packed",
                    "sources": [{"path": str(folder / "tokens")}],
                    "seq_len": 128,
                    "batch_size": 2,
                },
                "objective": "next_token",
                "budget": {"steps": 3},
            }
        ],
    }
    assert cli.run(["train", str(write(folder / "lm.yaml", run))]) == 0
    out = folder / "made.wav"
    words = ["generate", str(folder / "lm"), "--to", "audio", "--max-tokens", "12", "-o", str(out)]
    assert cli.run(words) == 0
    samples, rate = soundfile.read(out)
    hop = load_tokenizer(folder / "tokenizers" / "audio").net.samples_per_frame  # type: ignore[attr-defined]
    assert rate == RATE and len(samples) % hop == 0


@pytest.mark.slow
def test_it_is_trained_further(folder: Path) -> None:
    run = {
        "name": "codec",
        "init_from": str(folder / "tokenizers" / "audio"),
        "stages": [
            {
                "data": {
                    "kind": "items",
                    "path": str(folder / "sounds"),
                    "modality": "audio",
                    "sample_rate": RATE,
                    "batch_size": 2,
                    "crop_seconds": 0.04,
                },
                "objective": {
                    "kind": "codec",
                    "sample_rate": RATE,
                    "windows": [64, 128],
                    "bypass_steps": 0,
                },
                "budget": {"steps": 2},
            }
        ],
    }
    assert cli.run(["train", str(write(folder / "codec.yaml", run))]) == 0
    before = load_tokenizer(folder / "tokenizers" / "audio")
    after = load_tokenizer(folder / "codec")
    assert after.spec.n_codebooks == BOOKS and after.spec.fingerprint != before.spec.fingerprint
    moved = [
        float((a - b).abs().max())
        for a, b in zip(before.net.parameters(), after.net.parameters(), strict=True)  # type: ignore[attr-defined]
    ]
    assert all(torch.isfinite(torch.tensor(moved))) and min(moved) > 0
