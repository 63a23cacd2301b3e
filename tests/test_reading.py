"""Hostile JSON and YAML: one line, exit code 2, and one loader for all of it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml
from source_tree import TREES, module

from mm.cli import main as cli
from mm.errors import UserError
from mm.reading import MAX_DEPTH, MAX_YAML_BYTES, parse_json, parse_yaml
from mm.tokenizers.text.bytes import BytesConfig

DEEP = "[" * 2_000 + "]" * 2_000
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
# What these files read was written by this program for itself, in the same run or cache.
OWN = (
    "trainer", "tasks.run", "quickstart", "faults", "data.pack.output", "data.pack.writer",
    "data.pack.job",
)  # fmt: skip


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_what_is_nested_too_deep_is_a_value_error(parse) -> None:
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    brackets = json.dumps({"[" * 200: ["{" * 200]})  # inside a text they are no levels
    assert parse(brackets) == json.loads(brackets)
    for n in (MAX_DEPTH + 1, 500, 2_000):
        with pytest.raises(ValueError, match="nested deeper than"):
            parse("[" * n + "]" * n)


def test_yaml_that_multiplies_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        parse_yaml(BOMB)
    with pytest.raises(ValueError, match="nested deeper"):
        parse_yaml("a: &a [*a]")
    with pytest.raises(ValueError, match="the limit is"):
        parse_yaml(" " * (MAX_YAML_BYTES + 1))
    assert parse_yaml("a: &a [1]\nb: *a") == {"a": [1], "b": [1]}


def test_every_file_that_a_command_reads_may_be_hostile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> None:
        assert cli.run([str(word) for word in words]) == 2, words
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and ("nested" in err or "more than" in err), err

    for text in (DEEP, BOMB):
        (tmp_path / "x.yaml").write_text(text)
        refused("config", "show", tmp_path / "x.yaml")
    refused("config", "show", "quickstart/backbone", f"name={DEEP}")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/manifest.json").write_text(DEEP)
    refused("data", "verify", tmp_path / "shards")
    BytesConfig().build().save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer/hashes.json").unlink()
    (tmp_path / "tokenizer/tokenizer.yaml").write_text(DEEP)
    refused("tokenizer", "eval", tmp_path / "tokenizer", "--data", tmp_path)
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        (tmp_path / name).write_text(DEEP)
    refused("generate", tmp_path, "--to", "text")


def test_nobody_else_parses_what_may_be_hostile() -> None:
    found = [
        f"{module(file)}:{node.lineno}"
        for file, tree in TREES.items()
        if module(file) != "reading" and not module(file).startswith(OWN)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("loads", "load", "safe_load")
        and isinstance(node.value, ast.Name)
        and node.value.id in ("json", "yaml")
    ]
    assert not found, f"take mm.reading.parse_json or parse_yaml: {', '.join(found)}"


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
@pytest.mark.parametrize("text", ['["\\ud800"]', '{"a\\uDFFFb": 1}', '{"k": [{"x": "\\udc80"}]}'])
def test_half_a_character_is_a_value_error(parse, text: str) -> None:
    """No file name and no UTF-8 can hold it, so it would be an exception much later."""
    for given in (text, text.encode()):
        with pytest.raises(ValueError, match=r"half a character|invalid Unicode"):
            parse(given)


def test_whole_characters_stay() -> None:
    for text in ('["\\ud83d\\ude00"]', '["\\\\ud800"]', '["é"]'):
        assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    assert parse_yaml('["é", "\\\\ud800"]') == ["é", "\\ud800"]
    with pytest.raises(ValueError):
        parse_json(b'["\xed\xa0\x80"]')  # the same in bytes, which json.loads takes


def test_yaml_without_libyaml_has_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.reading._SafeLoader", yaml.SafeLoader)
    test_yaml_that_multiplies_itself_is_refused()
    test_what_is_nested_too_deep_is_a_value_error(parse_yaml)
    test_half_a_character_is_a_value_error(parse_yaml, '["\\ud800"]')


def test_a_user_error_can_be_shown_whatever_it_tells() -> None:
    text = str(UserError(f"file.yaml: key '{'x' * 50_000}\ud800' is unknown; run: mm config keys"))
    assert text.encode() and len(text) < 2_100
    assert text.startswith("file.yaml: key 'xxx") and text.endswith("; run: mm config keys")
    assert str(UserError("two\nlines")) == "two\nlines"


def test_an_override_of_half_a_character_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("name=a\udcff", "\udcff=1"):
        assert cli.run(["config", "show", "quickstart/backbone", words]) == 2
        assert "half a character" in capsys.readouterr().err
