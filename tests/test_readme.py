"""README and CONTRIBUTING hold: every command parses, the cheap ones run, the diffs apply and pass
the laws.

The command `make quickstart` itself is covered by the slow test `test_the_quickstart_command`, at a
small share of its
budget; `make test` is what `.ci/run` calls.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
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
from mm.data.modalities.decode import EXTENSIONS
from mm.registry import TOKENIZERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
OWN_DATA = README.index("## Your own data")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text: str = README) -> list[str]:
    """Every line of the bash blocks, without its comment; a `for` loop gives one command for each
    word.
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


MM_COMMANDS = [c[c.index("mm ") :] for c in commands() if re.search(r"(^|-m )mm ", c)]


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


@pytest.mark.parametrize(
    "command", [c for c in MM_COMMANDS if c.startswith(("mm doctor", "mm config"))]
)
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
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            assert (ROOT / target).exists(), f"README or CONTRIBUTING links to {target}"


def test_the_table_of_modalities_is_true() -> None:
    rows = re.findall(r"^\| (text|bytes|image|audio) \|(.*)$", README, re.M)
    assert [row[0] for row in rows] == ["text", "bytes", "image", "audio"]
    for modality, row in rows:
        for extension in re.findall(r"\.(\w+)", row.split("|")[0]):
            assert EXTENSIONS[extension] == modality
        kinds = re.findall(r"`(\w+)`", row.split("|")[1])
        assert kinds and kinds[0] in TOKENIZERS
    assert {row[0] for row in rows} - {"bytes"} == set(EXTENSIONS.values())


def test_the_python_example_uses_what_exists() -> None:
    (code,) = blocks("python")
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "mm"
        ):
            assert callable(getattr(mm, node.attr))


def copy_of_the_repository(folder: Path) -> Path:
    ignore = shutil.ignore_patterns(
        ".git",
        ".venv*",
        "runs",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        "wandb",
        "shared",
    )
    return Path(shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=ignore))


def apply(section: str, copy: Path) -> list[str]:
    """Apply the diff of a section of CONTRIBUTING to a copy of the repository; return its added
    lines.
    """
    (diff,) = blocks("diff", CONTRIBUTING.split(f"## {section}\n")[1].split("\n## ")[0])
    applied = subprocess.run(
        ["git", "apply", "-"], input=diff, cwd=copy, capture_output=True, text=True, timeout=60
    )
    assert applied.returncode == 0, f"make the diff of '{section}' again: {applied.stderr}"
    return [line for line in diff.splitlines() if line.startswith("+")]


LAWS = [
    ("A mixer", "tests/test_contract.py", "mixer:ema"),
    ("A mixer", "tests/test_layout.py", "ema"),
    ("A tokenizer", "tests/test_contract_tokenizers.py", "mu_law"),
    ("An objective", "tests/trainer/test_contract_training.py", "truncated_next_token"),
]


@pytest.mark.parametrize("section", sorted({section for section, *_ in LAWS}))
def test_the_diffs_of_contributing_apply(section: str, tmp_path: Path) -> None:
    added = apply(section, copy_of_the_repository(tmp_path))
    assert all(len(line) <= 101 for line in added)
    assert sum(line.startswith("+++ b/mm/registry.py") for line in added) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "file", "chosen"), LAWS, ids=[f"{s[0]}-{Path(s[1]).stem}" for s in LAWS]
)
def test_the_diffs_of_contributing_pass_the_laws(
    section: str, file: str, chosen: str, tmp_path: Path
) -> None:
    copy = copy_of_the_repository(tmp_path)
    apply(section, copy)
    environment = os.environ | {"PYTHONPATH": str(copy)}
    laws = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-k", chosen, "-p", "no:cacheprovider"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert laws.returncode == 0, laws.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", laws.stdout).group(1)) >= 1  # type: ignore[union-attr]


@pytest.mark.slow
def test_own_data_in_four_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's lines on a folder of captioned pictures, with a few optimizer steps each."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(60):
        colour = rng.integers(0, 255, 3)
        picture = np.broadcast_to(colour, (40, 48, 3)) + rng.integers(0, 20, (40, 48, 1))
        (tmp_path / "my_files").mkdir(exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(f"my_files/{i:03d}.jpg")
        Path(f"my_files/{i:03d}.txt").write_text(
            f"a plane of colour {colour[0] // 32} {colour[1] // 32} {colour[2] // 32}"
        )
    section = README[OWN_DATA:].split("\n## ")[1 - 1].split("\n## ")[0]
    lines = commands(section)
    assert len("".join(blocks("bash", section)).splitlines()) == 4
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "train" or words[:2] == ["tokenizer", "train"] and "image" in line:
            words += ["stages.0.budget.steps=3", "stages.0.schedule.warmup=1"]
        done = subprocess.run(
            [sys.executable, "-m", "mm", *words], capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
    assert (tmp_path / "runs" / "mine" / "model" / "model.safetensors").is_file()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mm",
            "generate",
            "runs/mine",
            "--prompt",
            "a plane of colour",
            "--to",
            "image",
            "-o",
            "out",
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with Image.open(tmp_path / "out.png") as image:
        assert image.size[0] >= 8


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_command(tmp_path: Path) -> None:
    """What `make quickstart` runs after the install, at 3 % of every training budget: every output
    is there and sound.
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
