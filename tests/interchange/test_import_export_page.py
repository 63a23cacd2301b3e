"""Each command of the how-to page, in its order; and what the commands refuse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from data_toys import wav
from hf_checkpoints import checkpoint
from hf_codecs import codec
from source_tree import ROOT

from mm.cli import main as cli

PAGE = (ROOT / "docs" / "how-to" / "import-export.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]


def test_every_command_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "their_model")
    codec(tmp_path / "their_codec", "encodec")
    for split, n in (("train", 3), ("test", 2)):
        (tmp_path / "my_sounds" / split).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "my_sounds" / split / f"{i}.wav").write_bytes(wav(i))
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 7
    for line in COMMANDS:
        assert cli.run(shlex.split(line)[1:]) == 0, line

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
