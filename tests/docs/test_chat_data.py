"""The page on chat data: its files as they stand there, its commands one after the other."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from mm.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-to" / "chat-data.md").read_text(encoding="utf-8")


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


@pytest.mark.slow
def test_every_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    sys.path.insert(0, str(ROOT / "tests" / "interchange"))
    try:
        from hf_checkpoints import checkpoint
    finally:
        sys.path.pop(0)
    from chat_toys import hf

    from mm.interchange.read import import_model

    monkeypatch.chdir(tmp_path)
    theirs = checkpoint(tmp_path / "their_model")
    (theirs / "tokenizer.json").write_bytes(hf("chatml").source)
    (theirs / "chat_template.jinja").write_bytes(hf("chatml").beside["chat_template.jinja"])
    import_model(theirs, tmp_path / "my_model", check=False)
    (tmp_path / "talks.jsonl").write_text(fences("text")[0])
    (tmp_path / "chat.yaml").write_text(fences("yaml")[0])
    commands = "".join(fences("bash")).splitlines()
    assert len(commands) == 5
    said = {}
    for command in commands:
        assert cli.run(shlex.split(command)[1:]) == 0, command
        said[command] = capsys.readouterr().out
    packed, inspected, _, answered, mapped = said.values()
    assert "map: messages=messages (guessed" in packed and "(as given)" in mapped
    assert packed.count("⟦it is 2.") == inspected.count("⟦it is 2.") == 1
    assert answered.strip() and "⟦" not in answered
    assert (tmp_path / "runs" / "chat" / "model" / "chat.json").is_file()
    exec(fences("python")[0], {})
    assert capsys.readouterr().out.strip()
