"""The page on fine-tuning: its commands one after the other, in a fresh folder, as a user would."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from mm.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


def their_model(folder: Path) -> None:
    """A small random model with a chat template, as `transformers` writes it."""
    sys.path.insert(0, str(ROOT / "tests" / "interchange"))
    try:
        from hf_checkpoints import checkpoint
    finally:
        sys.path.pop(0)
    from chat_toys import hf

    checkpoint(folder)
    (folder / "tokenizer.json").write_bytes(hf("chatml").source)
    (folder / "chat_template.jinja").write_bytes(hf("chatml").beside["chat_template.jinja"])


@pytest.mark.slow
def test_every_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    from chat_toys import jsonl, talk

    monkeypatch.chdir(tmp_path)
    their_model(tmp_path / "their_model")
    jsonl(tmp_path / "talks.jsonl", [talk(i, 1 + i % 2) for i in range(60)])
    (tmp_path / "book.txt").write_text((ROOT / "LICENSE").read_text()[:8000])
    (tmp_path / "tune.yaml").write_text(fences("yaml")[0])
    first = fences("bash")[0].splitlines()
    assert len(first) <= 8  # from chat data to an answer
    commands = "".join(fences("bash")).splitlines()
    assert len(commands) == 8
    said = {}
    for command in commands:
        assert cli.run(shlex.split(command)[1:]) == 0, command
        said[command] = capsys.readouterr().out
    assert "conversations: what the assistant says" in said[first[1]]
    assert said[first[2]].strip()
    talks, book = (json.loads(Path(f"runs/{n}/comparison.json").read_text()) for n in
                   ("talks", "book"))  # fmt: skip
    (row,) = talks["rows"]
    assert row["name"] == "text_perplexity" and row["tuned"] < row["base"]
    assert {row["of"] for row in book["rows"]} == {"own", "base"}
    assert "merge_lora" in Path("runs/book/finetune.yaml").read_text()  # the base has adapters
