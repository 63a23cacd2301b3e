"""What a pack does not take is counted and named: links, closed folders, names, cut recordings."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_toys import png, wav

from mm.cli.main import run as mm
from mm.data.pack.job import pack
from mm.errors import UserError


def rows(path: Path) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of one picture, with links of every kind; ten pictures lie elsewhere."""
    src, far = tmp_path / "src", tmp_path / "far"
    (src / "near").mkdir(parents=True)
    far.mkdir()
    (src / "near/a.png").write_bytes(png())
    for i in range(10):
        (far / f"{i}.png").write_bytes(png(i))
    (tmp_path / "one.png").write_bytes(png(77))
    (src / "file.png").symlink_to(tmp_path / "one.png")
    (src / "folder").symlink_to(far)
    (src / "again").symlink_to(src / "near")
    (src / "nothing.png").symlink_to(tmp_path / "gone.png")
    (far / "back").symlink_to(far)
    (src / ".hidden.png").write_bytes(png())
    return src


def test_links_are_named(linked: Path, tmp_path: Path) -> None:
    report = pack(linked, tmp_path / "out", max_bad=1.0, progress=False)
    found = rows(tmp_path / "out/quarantine.jsonl")
    assert report.samples == {"train": 1} and report.quarantined == 3
    out = "a link that leads out of the folder: refused; read it with --follow-links"
    assert found == {"file.png": out, "folder": out, "nothing.png": "a link to nothing"}
    assert report.ignored == {"(hidden)": 1, "(link to a folder that is read where it lies)": 1}


def test_links_are_followed_when_asked_for(linked: Path, tmp_path: Path) -> None:
    """A loop ends; a link to nothing stays one."""
    report = pack(linked, tmp_path / "out", max_bad=1.0, progress=False, follow_links=True)
    assert report.samples == {"train": 12}
    assert rows(tmp_path / "out/quarantine.jsonl") == {
        "folder/back": "a link back to a folder that it lies in",
        "nothing.png": "a link to nothing",
    }


def test_a_folder_of_links_alone_is_not_called_empty(linked: Path, tmp_path: Path) -> None:
    shutil.rmtree(linked / "near")
    with pytest.raises(
        UserError, match="--follow-links.*what was left out is listed in .*quarantine.jsonl"
    ):
        pack(linked, tmp_path / "out", progress=False)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Files are opened as a user without rights would (root may open everything)."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.setfsuid(65534)
    try:
        yield
    finally:
        libc.setfsuid(0)


def test_a_folder_that_cannot_be_read_is_named() -> None:
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o777)
        for name in ("ok", "no"):
            (root / "src" / name).mkdir(parents=True)
            (root / "src" / name / "a.png").write_bytes(png())
        (root / "src" / "no").chmod(0)
        with as_nobody():
            report = pack(root / "src", root / "out", progress=False, max_bad=1.0)
            found = rows(root / "out/quarantine.jsonl")
        assert report.samples == {"train": 1} and report.quarantined == 1
        assert found == {"no": "a folder that cannot be read: Permission denied"}
    finally:
        (root / "src" / "no").chmod(0o755)
        shutil.rmtree(root)


def test_two_files_of_one_name_are_both_named(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in ("a.jpg", "a.JPEG", "b.png", "b.PNG", "c.png"):
        (tmp_path / "src" / name).write_bytes(png())
    report = pack(tmp_path / "src", tmp_path / "out", progress=False, max_bad=1.0)
    found = rows(tmp_path / "out/quarantine.jsonl")
    assert report.samples == {"train": 1} and len(found) == 2
    for key, names in (("a", ("'a.jpg'", "'a.JPEG'")), ("b", ("'b.png'", "'b.PNG'"))):
        assert all(name in found[key] for name in names) and "rename one" in found[key]


def test_recordings_cut_short_are_no_samples(tmp_path: Path) -> None:
    """Too short to hear, and shorter than the header promises, raw and into tokens."""
    (tmp_path / "src").mkdir()
    good, streamed = wav(1, 800), bytearray(wav(2, 800))
    struct.pack_into("<I", streamed, 40, 0xFFFFFFFF)  # as a program writes that pipes its sound
    tail = good + b"LIST\4\0\0\0abcd"
    kinds = {
        "good": good,
        "tail": tail,
        "streamed": bytes(streamed),
        "short": wav(3, 28),
        "cut": good[:-300],
        "cut28": good[: 44 + 56],
    }
    for name, data in kinds.items():
        (tmp_path / "src" / f"{name}.wav").write_bytes(data)
    report = pack(tmp_path / "src", tmp_path / "out", progress=False, max_bad=1.0)
    found = rows(tmp_path / "out/quarantine.jsonl")
    assert report.samples == {"train": 3} and set(found) == {"short", "cut", "cut28"}
    assert found["short"] == "audio: 28 frames are 3.5 ms, less than 10 ms"
    assert "promises 1600 bytes of sound, the file has 1300" in found["cut"]
    from data_toys import ToyTokenizer

    tokens = pack(
        tmp_path / "src",
        tmp_path / "tokens",
        tokenizers={"audio": ToyTokenizer("audio")},
        progress=False,
        max_bad=1.0,
    )
    assert tokens.samples == {"train": 3} and tokens.quarantined == 3


def test_what_stopped_a_pack_is_listed_and_read_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the list; the summary shows reasons as they are, with their sample."""
    src = tmp_path / "src"
    src.mkdir()
    for i in range(20):
        (src / f"{i:02d}.txt").write_bytes(b"good" if i > 2 else b"ab\xff")
    with pytest.raises(UserError, match="what was left out is listed in .*out.quarantine.jsonl"):
        pack(src, tmp_path / "out", progress=False)
    assert len(rows(tmp_path / "out.quarantine.jsonl")) == 3
    assert mm(["data", "pack", str(src), "--out", str(tmp_path / "out"), "--max-bad", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no valid UTF-8 at byte 2" in shown and "00.txt" in shown
    assert not (tmp_path / "out.quarantine.jsonl").exists()
