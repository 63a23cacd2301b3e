"""Folders, tables and tars of strangers that `mm data pack` reads: refused or quarantined by name.

Ids begin with the numbers of the cases in the trial that found them; `tests/test_hostile_cases.py`
lists where each is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_toys import png, tar_of, token_shards

from mm.cli import main as cli

DEEP = b"[" * 10_000
DEEP_OBJECT = b'{"a":' * 10_000


def folder(root: Path, **files: bytes) -> Path:
    root.mkdir()
    for i in range(4):
        (root / f"{i}.txt").write_text(f"text {i}")
        (root / f"{i}.png").write_bytes(png(i))
    for name, data in files.items():
        (root / name.replace("__", ".")).write_bytes(data)
    return root


def loop(root: Path) -> Path:
    folder(root)
    (root / "a.txt").symlink_to("b.txt")
    (root / "b.txt").symlink_to("a.txt")
    return root


def not_unicode(root: Path) -> Path:
    folder(root)
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe.txt")).write_text("text")
    return root


def table(root: Path, *lines: str) -> Path:
    folder(root)
    good = [json.dumps({"key": f"k{i}", "text": f"t {i}", "image": f"{i}.png"}) for i in range(4)]
    (root / "x.jsonl").write_text("\n".join([*good, *lines]))
    return root / "x.jsonl"


def parquet(root: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    root.mkdir()
    rows = {"key": [f"k{i}" for i in range(9)], "text": [f"text {i}" for i in range(9)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), root / "x.parquet")
    data = bytearray((root / "x.parquet").read_bytes())
    data[10] ^= 0xFF
    (root / "x.parquet").write_bytes(data)
    return root / "x.parquet"


def tar(root: Path) -> Path:
    root.mkdir()
    members = [("a.txt", b"one"), ("a.json", DEEP), ("b.txt", b"two"), ("b.json", b"{}")]
    return tar_of(root / "x.tar", members)


SOURCES: dict[str, Callable[[Path], Path]] = {
    "148 a json member nested": tar,
    "264 a loop of links": loop,
    "270 a name that is not UTF-8": not_unicode,
    "273 a json nested": lambda r: folder(r, **{"0__json": DEEP}),
    "274 a json of objects nested": lambda r: folder(r, **{"0__json": DEEP_OBJECT}),
    "304 a key of half a character": lambda r: table(r, '{"key": "\\ud800", "text": "x"}'),
    "310 a path of 5000 characters": lambda r: table(
        r, json.dumps({"key": "long", "text": "x", "image": "p" * 5000})
    ),
    "336 a byte of a parquet": parquet,
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_is_packed_without_it_or_refused(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SOURCES[case](tmp_path / "in")
    words = ["data", "pack", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    code = cli.run([*words, "--max-bad", "1.0"])
    out, err = capsys.readouterr()
    assert code in (0, 2) and "for the traceback" not in err, err
    assert len(err) < 3000, "nothing is echoed whole"
    if code == 0:
        assert cli.run(["data", "verify", str(tmp_path / "out")]) == 0
        bad = tmp_path / "out/quarantine.jsonl"
        assert bad.is_file() and bad.read_text().strip() or "left out" in out + err, out + err
    else:
        assert "mm: " in err and not (tmp_path / "out/manifest.json").exists()


def resigned(root: Path, cut: int) -> None:
    """Cut the first shard to ``cut`` bytes and write its own hash into the manifest."""
    manifest: dict[str, Any] = json.loads((root / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    path = root / "train" / shard["name"]
    path.write_bytes(path.read_bytes()[:cut])
    shard |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": cut}
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("cut", [0, 513], ids=["1 cut at 0", "7 cut at 513"])
def test_a_shard_that_was_cut_and_signed_anew_is_refused(
    tmp_path: Path, cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    token_shards(tmp_path, 8)
    resigned(tmp_path / "tokens", cut)
    for command in ("inspect", "verify"):
        code = cli.run(["data", command, str(tmp_path / "tokens")])
        out, err = capsys.readouterr()
        assert code == 2 and "for the traceback" not in err, out + err
