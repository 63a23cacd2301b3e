"""`mm env` tells what a report of a bug needs and no secret; the lock file fits pyproject.toml."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mm.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)(?:\s*;\s*([^\\]+?))?\s*\\?$")


def test_env_holds_what_a_report_needs_and_no_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-show")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:do-not-show@example.org/x")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("UNRELATED", "do-not-show")
    assert cli.run(["env", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert "do-not-show" not in out
    assert found["variables"]["WANDB_API_KEY"] == "***"
    assert found["variables"]["HF_ENDPOINT"] == "https://***@example.org/x"
    assert found["variables"]["NCCL_DEBUG"] == "INFO" and "UNRELATED" not in found["variables"]
    assert {"mm", "python", "torch", "deepspeed", "numpy"} <= found["versions"].keys()
    assert found["machine"]["cores"] >= 1 and "commit" in found["git"]
    assert cli.run(["env"]) == 0
    out = capsys.readouterr().out
    assert "NCCL_DEBUG" in out and "do-not-show" not in out


def pins() -> dict[str, list[tuple[str, str | None]]]:
    """Package -> versions of the lock file with their markers."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if pin := PIN.match(line):
            found.setdefault(pin[1].lower(), []).append((pin[2], pin[3]))
    return found


def test_the_lock_file_is_in_step_with_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = pins()
    mend = "make it anew with the command in its second line"
    for text in project["dependencies"]:
        need = Requirement(text)
        have = locked.get(need.name.lower())
        assert have, f"requirements.lock lacks {need.name}: {mend}"
        for version, _ in have:
            assert need.specifier.contains(version, prereleases=True), f"{text}: {version}; {mend}"


def test_every_line_of_the_lock_file_has_a_hash_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert len(pins()) > 50 and "://" not in text and "--index" not in text
    for part in re.split(r"\n(?=[A-Za-z])", text.split("\n", 2)[2]):
        assert "--hash=sha256:" in part, part
    docker = (ROOT / "Dockerfile").read_text()
    assert "--require-hashes -r requirements.lock" in docker
