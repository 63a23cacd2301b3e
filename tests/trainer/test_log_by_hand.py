"""What a run tells of itself: what it was made from, and pages of what it made."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mm.trainer.log import html_table, lineage


def packed(root: Path, name: str, **manifest: Any) -> Path:
    made = root / name
    made.mkdir()
    (made / "manifest.json").write_text(json.dumps(manifest))
    return made


def test_packed_data_are_told_with_what_they_were_packed_from(tmp_path: Path) -> None:
    """The source lies beside them; one that is not there, or is the data themselves, ends it."""
    run: Any = SimpleNamespace(tracking=SimpleNamespace(upload=()))
    raw = packed(tmp_path, "raw", source="elsewhere", license="MIT")
    splits = {"train": {"samples": 3}}
    tokens = packed(tmp_path, "tokens", kind="tokens", source="raw", splits=splits)
    found = list(lineage._with_origins(run, tokens))
    assert [(one.kind, one.name) for one in found] == [
        ("tokens", "tokens-tokens"),
        ("data", "data-raw"),
    ]
    version = hashlib.sha256((tokens / "manifest.json").read_bytes()).hexdigest()[:12]
    assert found[0].metadata == {
        "path": str(tokens),
        "version": version,
        "made_from": ["data:data-raw"],
        "source": "raw",
        "samples": {"train": 3},
    }
    told = found[1].metadata
    assert (told["path"], told["made_from"], told["license"]) == (str(raw), [], "MIT")
    (alone,) = lineage._with_origins(run, packed(tmp_path, "own", source="own"))
    assert alone.metadata["made_from"] == []


def test_a_page_shows_words_pictures_and_sounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long text the beginning, as much of a word as of a file; of a large file its name."""
    monkeypatch.setattr(html_table, "MAX_LETTERS", 7)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16))
    (tmp_path / "a.txt").write_text("a < bcdefghi")
    picture, sound, text = (tmp_path / f"a.{ending}" for ending in ("png", "wav", "txt"))
    coded = lambda path: base64.b64encode(path.read_bytes()).decode()
    page = html_table.html_table(
        [{"x": picture, "n": 3}, {"x": sound}, {"x": text, "n": "b < 345678"}]
    )
    body = re.sub(r"audio/[\w.-]+;", "audio/*;", page.split("<tbody>")[1])  # systems name it anew
    assert page.count("<th>") == 2 and "<th>x</th><th>n</th>" in page
    rows = [
        f'<img src="data:image/png;base64,{coded(picture)}"></td><td>3',
        f'<audio controls src="data:audio/*;base64,{coded(sound)}"></audio></td><td>',
        "a &lt; bcd</td><td>b &lt; 345",
    ]
    assert body == "".join(f"<tr><td>{row}</td></tr>" for row in rows) + "</tbody></table>"
    monkeypatch.setattr(html_table, "MAX_BYTES", 10)
    assert html_table._cell(picture) == "a.png: too long to show"
