"""README and CONTRIBUTING hold: commands parse, the cheap ones run, tables and links are true.

The command `make quickstart` itself is covered by slow tests: `test_the_quickstart_command`, at a
small share of its budget, and `test_it_meets_its_bars`, whole; `make test` is what `.ci/run` calls.
The examples that CONTRIBUTING names are in test_examples.py.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.main
from PIL import Image

import mm
from mm import config as configs
from mm.cli import main as cli
from mm.data.modalities.base import table
from mm.model.backbones.stack import presets
from mm.registry import MIXERS, TOKENIZERS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
OWN_DATA = README.index("## Your own data")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.S | re.M)


def commands(text: str = README) -> list[str]:
    """Every line of the bash blocks, without its comment.

    A `for` loop gives one command for each word.
    """
    out = []
    for line in "".join(blocks("bash", text)).splitlines():
        line = re.sub(r"\s{2,}# .*|\s+# .*$", "", line).strip()
        loop = re.fullmatch(r"for (\w+) in ([\w ]+); do (.*); done", line)
        if loop:
            name, words, body = loop.groups()
            out += [body.replace(f"${name}", word) for word in words.split()]
        elif line:
            out.append(line)
    return out


MM_COMMANDS = [
    c[c.index("mm ") :]
    for c in (*commands(), *commands(CONTRIBUTING))
    if re.search(r"(^|-m |PYTHONPATH=. )mm ", c)
]


@pytest.mark.parametrize("command", MM_COMMANDS)
def test_every_mm_command_parses(command: str) -> None:
    """With its options and their types; a config that it names exists."""
    words = shlex.split(command)[1:]
    node = typer.main.get_command(cli.app)
    context = node.make_context("mm", list(words))
    rest = list(words)
    while hasattr(node, "get_command"):
        name = rest.pop(0)
        node = node.get_command(context, name)
        assert node is not None, name
        if not hasattr(node, "get_command"):
            context = node.make_context(name, list(rest), parent=context)
    for word in rest:
        if word.startswith("configs/") and word.endswith(".yaml"):
            configs.find(word)


# `mm doctor --nodes` asks other machines over ssh: tests/launch runs it on real ones.
CHEAP = [c for c in MM_COMMANDS if c.startswith(("mm doctor", "mm config")) and "--nodes" not in c]


@pytest.mark.parametrize("command", CHEAP)
def test_cheap_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(shlex.split(command)[1:]) == 0


def test_make_targets_are_what_the_readme_says() -> None:
    # Without what an outer `make test` hands down: its flags and level change what is printed.
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}

    def dry(*words: str) -> str:
        command = ["make", "-n", "VENV=/nowhere/venv", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    makes = [c for c in commands() if c.startswith("make ")]
    assert makes == ["make quickstart", "make test"]
    said = dry("quickstart")
    assert said.rstrip().endswith("/nowhere/venv/bin/mm quickstart")
    assert said.index("5.5 GB") < said.index("pip")  # it says how much before it installs
    assert "6 minutes" in said
    assert "/nowhere/venv/bin/python -m pytest" in dry("test")
    with_index = dry("quickstart", "TORCH_INDEX=http://index.example")
    assert '--index-url "http://index.example"' in with_index and "5.5 GB" not in with_index
    assert "make test " in (ROOT / ".ci" / "run").read_text() and os.access(
        ROOT / ".ci" / "run", os.X_OK
    )


def test_links_lead_somewhere() -> None:
    for text in (README, CONTRIBUTING):
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", prose):
            if target.startswith("https://arxiv.org/abs/"):
                continue
            assert (ROOT / target).exists(), f"README or CONTRIBUTING links to {target}"


def test_the_table_of_modalities_is_true() -> None:
    rows = re.findall(r"^\| (text|bytes|image|audio|video|time_series|array) \|(.*)$", README, re.M)
    kinds = ["text", "bytes", "image", "audio", "video", "time_series", "array"]
    assert [row[0] for row in rows] == kinds
    for modality, row in rows:
        for extension in re.findall(r"\.(\w+)", row.split("|")[0]):
            assert table().extensions[extension] == modality
        kinds = re.findall(r"`(\w+)`", row.split("|")[1])
        assert kinds and kinds[0] in TOKENIZERS
    assert {row[0] for row in rows} - {"bytes"} == set(table().modalities)


def test_the_python_example_uses_what_exists() -> None:
    (code,) = blocks("python")
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "mm"
        ):
            assert callable(getattr(mm, node.attr))


def paragraphs(text: str) -> list[str]:
    """Prose of a page: no code blocks, tables, headings or pictures."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [p for p in re.split(r"\n\s*\n", prose) if p.strip() and p.strip()[0] not in "|#!"]


def test_no_paragraph_is_over_four_lines() -> None:
    found = paragraphs(README)
    assert len(found) > 5
    for paragraph in found:
        lines = paragraph.strip().splitlines()
        assert len(lines) <= 4 and all(len(line) <= 140 for line in lines), paragraph


def test_the_table_of_sequence_layers_is_true() -> None:
    section = README.split("## Sequence layers\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][
        1:
    ]
    assert len(rows) == 6
    for family, words, preset, paper in rows:
        found = re.findall(r"`(\w+)`", words)
        assert len(found) >= 3 and all(word in {*presets(), *MIXERS} for word in found), family
        (number,) = re.findall(r"arxiv.org/abs/([\d.]+)\)", paper)
        files = re.findall(r"`(configs/mixer/\w+\.yaml)`", preset)
        texts = [(ROOT / file).read_text(encoding="utf-8") for file in files]
        classes = [inspect.getmodule(MIXERS.get(word)) for word in found if word in MIXERS]
        texts += [inspect.getsource(module) for module in classes if module is not None]
        assert any(f"arXiv:{number}" in text for text in texts), (family, number)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_own_data_in_four_lines(tmp_path: Path) -> None:
    """The README's lines on a folder of captioned pictures, at a hundredth of the time."""
    rng = np.random.default_rng(0)
    (tmp_path / "my_files").mkdir()
    for i in range(60):
        colour = rng.integers(0, 255, 3)
        picture = np.broadcast_to(colour, (40, 48, 3)) + rng.integers(0, 20, (40, 48, 1))
        file = tmp_path / "my_files" / f"{i:03d}.jpg"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file)
        file.with_suffix(".txt").write_text(
            f"a plane of colour {colour[0] // 32} {colour[1] // 32} {colour[2] // 32}"
        )
    section = README[OWN_DATA:].split("\n## ")[0]
    lines = commands(section)
    assert len(lines) == len("".join(blocks("bash", section)).splitlines()) == 4
    for line in lines:
        words = shlex.split(line)[1:]
        words += ["--minutes", "0.1"] * (words[0] == "init")
        command = [sys.executable, "-m", "mm", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1000)
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
    run = tmp_path / "my_run" / "runs" / "first"
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "report" / "index.html").is_file()
    assert {file.name for file in tmp_path.iterdir()} <= {"my_files", "my_run", "cat.png", "wandb"}
    with Image.open(tmp_path / "cat.png") as image:
        assert image.size[0] >= 8


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_command(tmp_path: Path) -> None:
    """What `make quickstart` runs after the install, at 3 % of every training budget.

    Every output is there and sound.
    """
    out = tmp_path / "quickstart"
    command = [sys.executable, "-m", "mm", "quickstart", "--out", str(out), "--scale", "0.03"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "results.json",
        "commands.json",
        "report/index.html",
        "model/model.safetensors",
    ):
        assert (out / name).is_file(), name
    for modality in ("text", "image", "audio"):
        assert json.loads((out / "tokenizers" / modality / "eval.json").read_text())["items"] > 0
    figures = {
        row["name"]: row for row in json.loads((out / "results.json").read_text())["figures"]
    }
    for pair in (
        "image_to_text",
        "audio_to_text",
        "text_to_image",
        "text_to_audio",
        "image_to_audio",
        "audio_to_image",
    ):
        row = figures[f"{pair}_accuracy"]
        assert 0 <= row["value"] <= 1 and 0.05 < row["chance"] < 0.2
    for modality in ("text", "image", "audio"):
        assert 0 < figures[f"{modality}_bits_per_byte"]["value"]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["step"] == 1
    suffixes = {p.suffix for p in (out / "samples").rglob("*") if p.is_file()}
    assert {".png", ".wav", ".txt"} <= suffixes
    recorded = [entry["command"] for entry in json.loads((out / "commands.json").read_text())]
    assert any(c.startswith("mm data pack") for c in recorded)
    assert any("mm train" in c for c in recorded)
