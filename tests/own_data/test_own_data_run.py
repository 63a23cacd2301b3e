"""`mm run`: the commands of a folder in order, skipped where they are done; and the first hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from own_files import PHOTOS, WORDS, book, photographs, recordings
from PIL import Image

from mm.cli import main as cli
from mm.errors import UserError
from mm.own_data.run import read_commands, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A book with the commands that need no training."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "text.yaml").write_text("tokenizer: {kind: bpe, modality: text, vocab_size: 300}\n")
    (out / "run.sh").write_text(
        "#!/usr/bin/env bash\nset -euo pipefail\n# why\n"
        f"mm data pack {book(tmp_path)} --out {out}/data --val-share 0.2\n"
        f"mm tokenizer train {out}/text.yaml --data {out}/data --out {out}/tokenizers/text\n"
        f"mm tokenizer eval {out}/tokenizers/text --data {out}/data --split val "
        f"--json {out}/eval.json\n"
    )
    return out


def done_already(text: str) -> list[bool]:
    """Of every echoed command, whether it was skipped."""
    return ["done already" in part for part in text.split("\n$ mm ")[1:]]


def test_what_is_done_is_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder)
    assert done_already(capsys.readouterr().out) == [False, False, False]
    run(folder)
    assert done_already(capsys.readouterr().out) == [False, True, True]  # pack looks by itself
    of_pack = json.loads((folder / "runs/first/commands.json").read_text())[:1]
    run(folder, just_run=of_pack)  # as `mm finetune` has done
    assert done_already(capsys.readouterr().out) == [True, True]
    assert json.loads((folder / "runs/first/commands.json").read_text())[0] == of_pack[0]
    (folder / "eval.json").unlink()
    run(folder)
    assert done_already(capsys.readouterr().out) == [False, True, False]
    (folder / "text.yaml").write_text("tokenizer: {kind: bpe, modality: text, vocab_size: 310}\n")
    run(folder)
    assert done_already(capsys.readouterr().out) == [False, False, False]
    assert json.loads((folder / "eval.json").read_text())["vocab_size"] <= 310


def test_a_failed_command_is_named_and_done_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (folder / "text.yaml").read_text()
    (folder / "text.yaml").write_text(good.replace("bpe", "bpw"))
    with pytest.raises(UserError, match=r"stopped at: mm tokenizer train .* mm run .*out again"):
        run(folder)
    (folder / "text.yaml").write_text(good)
    capsys.readouterr()
    run(folder)
    assert done_already(capsys.readouterr().out) == [False, False, False]


def test_only_commands_of_mm_are_run(folder: Path) -> None:
    with open(folder / "run.sh", "a") as file:
        file.write("rm -rf data\n")
    with pytest.raises(UserError, match=r"run.sh:7: 'rm' is no command of mm"):
        read_commands(folder / "run.sh")
    with pytest.raises(UserError, match="mm init SRC --out"):
        read_commands(folder / "none.sh")


def test_init_prints_reasons_and_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["init", str(book(tmp_path)), "--out", str(out), "--json", str(tmp_path / "a.json")]
    assert cli.run(words) == 0
    said = capsys.readouterr().out
    commands = [line for line in (out / "run.sh").read_text().splitlines() if line[:3] == "mm "]
    assert all(f"  {line}\n" in said for line in commands)
    assert commands == json.loads((tmp_path / "a.json").read_text())["commands"]
    assert "a document over seq_len becomes several" in said
    assert cli.run(words) == 0 and "kept: " in capsys.readouterr().out


def mm(*words: str | Path, cwd: Path) -> str:
    command = [sys.executable, "-m", "mm", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["photographs", "recordings", "book"])
def test_the_first_hour(kind: str, tmp_path: Path) -> None:
    """`mm init` and `mm run` on real files, at a small share of the budget: all is there."""
    if kind == "photographs":
        photographs(tmp_path / "my_files", 40)
    elif kind == "recordings":
        recordings(tmp_path / "my_files")
    else:
        book(tmp_path)
    src = "book.txt" if kind == "book" else "my_files"
    mm("init", src, "--out", "my_run", "--minutes", "0.1", cwd=tmp_path)
    mm("run", "my_run", cwd=tmp_path)
    home = tmp_path / "my_run" / "runs" / "first"
    figures = {
        row["name"]: row for row in json.loads((home / "results.json").read_text())["figures"]
    }
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss/total" in row]
    assert (
        steps == [*range(1, len(steps) + 1)] and len(steps) >= 10
    )  # as many as there was time for
    assert (home / "report" / "index.html").stat().st_size > 20_000
    if kind == "photographs":
        row = figures["pixels_to_text_accuracy"]
        assert 0 <= row["value"] <= 1 and row["probe"] > 0.5  # of few
        assert any(p.suffix == ".png" for p in (home / "samples").rglob("*"))
        mm("generate", home, "--prompt", PHOTOS[0], "--to", "image", "-o", "a.png", cwd=tmp_path)
        assert np.asarray(Image.open(tmp_path / "a.png")).shape == (32, 32, 3)
        said = mm("generate", home, "--image", "a.png", "--to", "text", cwd=tmp_path)
        assert any(word in said for word in PHOTOS)  # read by its pixels
    elif kind == "recordings":
        assert figures["audio_to_text_accuracy"]["n"] == 2 * len(WORDS)
        mm("generate", home, "--prompt", "one", "--to", "audio", "-o", "a.wav", cwd=tmp_path)
        assert (tmp_path / "a.wav").stat().st_size > 1000
    else:
        assert figures["bytes_bits_per_byte"]["value"] < figures["bytes_bits_per_byte"]["chance"]
        last = rows[-1]
        assert last["data/rejects/too_long"] == 0 and last["data/rejects/filtered"] == 0
    assert "done already" in mm("run", "my_run", cwd=tmp_path)
