"""Each command of the how-to page, in its order; and what the commands refuse."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from data_toys import wav
from hf_checkpoints import checkpoint
from hf_codecs import codec
from PIL import Image
from source_tree import ROOT
from test_encoders import encoder, processor
from test_llava import llava

from mm.cli import main as cli
from mm.model.folder import load_tensors

PAGE = (ROOT / "docs" / "how-to" / "import-export.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]
TEXT, PICTURES, SOUND, CODECS = COMMANDS[:3], COMMANDS[3:7], COMMANDS[7:13], COMMANDS[13:]


def run(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "cp":
        subprocess.run(words, check=True)
    else:
        assert cli.run(words[1:]) == 0, line


@pytest.mark.slow
def test_the_commands_on_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llava(tmp_path / "their_vlm")
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = (level + rng.integers(-30, 30, (20, 24, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    assert len(PICTURES) == 4
    for line in PICTURES:
        run(line)
    compared = json.loads(Path("runs/photos/comparison.json").read_text())
    assert "accuracy" in json.dumps(compared) and compared["cost"]["steps"] == 4

    import transformers

    kind = transformers.AutoModelForImageTextToText
    _, problems = kind.from_pretrained("their_vlm_tuned", output_loading_info=True)
    assert not any(problems.values()), problems


@pytest.mark.slow
def test_the_commands_on_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(encoder(tmp_path / "their_whisper", "whisper"), "whisper")
    checkpoint(tmp_path / "their_model")
    rng = np.random.default_rng(0)
    for name, hz in (("low", 200), ("high", 1500)):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for i in range(6):
            at = np.arange(4000 + 300 * i) / 8000
            wave = 0.3 * np.sin(2 * np.pi * hz * at) + 0.01 * rng.standard_normal(len(at))
            soundfile.write(tmp_path / "sounds" / name / f"{i}.wav", wave, 8000)
    monkeypatch.chdir(tmp_path)
    (yaml,) = (y for y in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if "name: hear" in y)
    Path("hear.yaml").write_text(yaml)
    assert len(SOUND) == 6
    run(TEXT[0])
    for line in SOUND:
        run(line)
    before = load_tensors("my_ears/model.safetensors")
    after = load_tensors("runs/hear/model/model.safetensors")
    assert all(torch.equal(t, after[f"adapters.audio.{n}"]) for n, t in before.items())


def test_the_commands_on_text_and_codecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "their_model")
    codec(tmp_path / "their_codec", "encodec")
    for split, n in (("train", 3), ("test", 2)):
        (tmp_path / "my_sounds" / split).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "my_sounds" / split / f"{i}.wav").write_bytes(wav(i))
    monkeypatch.chdir(tmp_path)
    assert len(CODECS) == 4
    for line in (*TEXT, *CODECS):
        run(line)

    import transformers

    kind = transformers.AutoModelForCausalLM
    model, problems = kind.from_pretrained("their_model_tuned", output_loading_info=True)
    assert not any(problems.values()), problems
    assert model.config.vocab_size == 320
    tokenizer = transformers.AutoTokenizer.from_pretrained("their_model_tuned")
    assert tokenizer.decode(tokenizer("the cat", add_special_tokens=False).input_ids) == "the cat"


def test_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm.interchange import check

    given, out = checkpoint(tmp_path / "given"), tmp_path / "out"
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    assert cli.run(["import", str(given), "--out", str(out)]) == 2
    assert "transformers is not installed" in capsys.readouterr().err and not out.exists()
    assert cli.run(["import", str(given), "--out", str(out), "--no-check"]) == 0
    assert "compared with nothing" in capsys.readouterr().out
    assert cli.run(["import", str(given), "--out", str(out), "--no-check"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.run(["export", str(out), "--out", str(tmp_path / "back")]) == 2
    assert cli.run(["export", str(out), "--out", str(tmp_path / "back"), "--no-check"]) == 0
