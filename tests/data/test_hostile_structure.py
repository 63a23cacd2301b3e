"""Manifests, indices and vocabularies that lie: refused in one line, seen by `mm data verify`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toys import token_shards
from typer.testing import CliRunner

from mm.cli.main import app
from mm.data.pack.job import pack
from mm.data.shards.verify import verify
from mm.errors import UserError
from mm.vocabulary import Vocabulary

JSON = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("structure")
    token_shards(root, 12)
    assert verify(root / "tokens")["ok"] and verify(root / "shards")["ok"]
    return root / "tokens"


@pytest.fixture
def shards(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "tokens"))


def edit(root: Path, change: Callable[[JSON], Any]) -> None:
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    found = change(manifest)
    path.write_text(json.dumps(manifest if found is None else found))


def refused(command: list[str]) -> str:
    """Run a command that must end with exit code 2 and one line."""
    import contextlib
    import io

    from mm.cli.main import run

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = run(command)
    text = said.getvalue()
    assert status == 2, text
    return text


SPLIT = lambda m: m["splits"]["train"]
MANIFESTS: dict[str, Callable[[JSON], Any]] = {
    "splits empty": lambda m: m.update(splits={}),
    "no splits": lambda m: m.pop("splits") and None,
    "splits a list": lambda m: m.update(splits=[]),
    "no kind": lambda m: m.pop("kind") and None,
    "no modalities": lambda m: m.pop("modalities") and None,
    "modalities null": lambda m: m.update(modalities=None),
    "a modality that no split has": lambda m: m["modalities"].append("video"),
    "a shard null": lambda m: SPLIT(m)["shards"].__setitem__(0, None),
    "a shard elsewhere": lambda m: SPLIT(m)["shards"][0].update(name="/etc/hostname"),
    "a shard that climbs": lambda m: SPLIT(m)["shards"][0].update(name="../x.tar"),
    "a shard twice": lambda m: SPLIT(m)["shards"].append(SPLIT(m)["shards"][0]),
    "samples that do not add up": lambda m: SPLIT(m).update(samples=99),
    "bytes below 0": lambda m: SPLIT(m)["shards"][0].update(bytes=-1),
    "no index": lambda m: SPLIT(m).pop("index") and None,
    "an index elsewhere": lambda m: SPLIT(m)["index"].update(name="../../index.npz"),
    "lengths a string": lambda m: SPLIT(m).update(lengths="x"),
    "a split that climbs": lambda m: m["splits"].update({"..": SPLIT(m)}),
    "no vocabulary": lambda m: m.pop("vocabulary") and None,
    "version 99": lambda m: m.update(version=99),
    "settings a number": lambda m: m.update(settings=-1),
    "no conversation's settings": lambda m: m.update(settings={"chat": None}),
    "a list": lambda m: [m],
    "null": lambda m: [],
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_lies_is_refused_by_key(shards: Path, case: str) -> None:
    edit(shards, MANIFESTS[case])
    for command in ("verify", "inspect"):
        assert "manifest.json: not a shard manifest" in refused(["data", command, str(shards)])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "", "\x00", "nan"])
def test_a_manifest_that_is_none(shards: Path, text: str) -> None:
    (shards / "manifest.json").write_text(text)
    assert "not a shard manifest" in refused(["data", "inspect", str(shards)])


def resign(root: Path, path: Path) -> None:
    """Write the hash of the index as it is now into the manifest."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(root, lambda m: SPLIT(m)["index"].update(sha256=digest, bytes=path.stat().st_size))


def columns(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name].copy() for name in file.files}


def swap_offsets(c: dict[str, np.ndarray]) -> None:
    c["offset"][[0, 2]] = c["offset"][[2, 0]]


INDICES: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "offsets swapped": swap_offsets,
    "lengths lie": lambda c: c["length_text"].__iadd__(1),
    "an offset beyond the shard": lambda c: c["offset"].__setitem__(0, 10**9),
    "a negative offset": lambda c: c["offset"].__setitem__(0, -512),
    "sizes of terabytes": lambda c: c["size"].__imul__(10**9),
    "a kind out of range": lambda c: c["kind"].__setitem__(0, 99),
    "shard 7 of 3": lambda c: c["shard"].__setitem__(-1, 7),
    "starts that fall": lambda c: c["start"].__setitem__(1, 999),
    "a column missing": lambda c: c.pop("offset"),
    "keys that are no UTF-8": lambda c: c["key_bytes"].__setitem__(0, 255),
    "floats": lambda c: c.update(offset=c["offset"].astype(np.float64)),
    "a kind that no shard may hold": lambda c: c["kinds"].__setitem__(0, "exe"),
    "a modality that climbs": lambda c: c.update({"length_../x": c["length_text"]}),
    "two dimensions": lambda c: c.update(start=c["start"][None]),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_lies_is_seen_by_verify_and_harms_nobody(shards: Path, case: str) -> None:
    """With the right hash in the manifest: `verify` names it, nothing else ends in a raw error."""
    path = shards / "train" / "index.npz"
    found = columns(path)
    INDICES[case](found)
    np.savez(path.open("wb"), **found)
    resign(shards, path)
    said = verify(shards)
    assert not said["ok"] and any("index.npz" in line for line in said["problems"]), said
    done = CliRunner().invoke(app, ["data", "inspect", str(shards)])
    assert done.exception is None or isinstance(done.exception, (UserError, SystemExit))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:1000]),
    "empty": lambda p: p.write_bytes(b""),
    "a flipped byte": lambda p: flip(p, 200),
    "no zip": lambda p: p.write_bytes(b"x" * 5000),
    "compressed": lambda p: np.savez_compressed(p.open("wb"), **columns(p)),
    "an object": lambda p: np.savez(p.open("wb"), start=np.array([{}], dtype=object)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_index_is_made_anew_from_the_shards(shards: Path, case: str) -> None:
    path = shards / "train" / "index.npz"
    if case == "compressed":
        found = columns(path)
        np.savez_compressed(path.open("wb"), **found)
    else:
        DAMAGE[case](path)
    resign(shards, path)
    assert not verify(shards)["ok"]
    done = CliRunner().invoke(app, ["data", "inspect", str(shards)])
    assert done.exit_code == 0, done.output


def test_lengths_of_the_manifest_are_those_of_the_shards(shards: Path) -> None:
    edit(shards, lambda m: SPLIT(m)["lengths"]["text"].update(total=1))
    assert any("text total is" in line for line in verify(shards)["problems"])


TEXT = {"modality": "text", "vocab_size": 8, "fingerprint": "f"}
VOCABULARIES: dict[str, JSON] = {
    "a modality twice": {"ranges": [TEXT, TEXT]},
    "a modality that climbs": {"ranges": [TEXT | {"modality": "../../x"}]},
    "a modality that is a list": {"ranges": [TEXT | {"modality": ["text"]}]},
    "no ids": {"ranges": [TEXT | {"vocab_size": 0}]},
    "ids below 0": {"ranges": [TEXT | {"vocab_size": -5}]},
    "half an id": {"ranges": [TEXT | {"vocab_size": 1.5}]},
    "ids in words": {"ranges": [TEXT | {"vocab_size": "512"}]},
    "10**12 ids": {"ranges": [TEXT | {"vocab_size": 10**12}]},
    "2**31 ids in all": {"ranges": [TEXT | {"vocab_size": 2**30, "n_codebooks": 4}]},
    "no codebooks": {"ranges": [TEXT | {"n_codebooks": 0}]},
    "10**9 codebooks": {"ranges": [TEXT | {"n_codebooks": 10**9}]},
    "a grid of nothing": {"ranges": [TEXT | {"grid": [0, 0]}]},
    "a grid below 0": {"ranges": [TEXT | {"grid": [-4, -4]}]},
    "a grid of 10**18": {"ranges": [TEXT | {"grid": [10**9, 10**9]}]},
    "a rate that is no number": {"ranges": [TEXT | {"tokens_per_second": float("nan")}]},
    "100 control tokens": {"ranges": [TEXT], "specials": ["x"] * 100},
    "no ranges": {},
    "a list": {"ranges": "text"},
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_a_vocabulary_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    """Signed with the right hash, as somebody would who wants it to be read."""
    raw = {"specials": []} | VOCABULARIES[case]
    path = tmp_path / "vocabulary.json"
    body = json.dumps(raw, indent=1)
    path.write_text(json.dumps(raw | {"sha256": hashlib.sha256(body.encode()).hexdigest()}))
    with pytest.raises(UserError, match="vocabulary.json: not a vocabulary file"):
        Vocabulary.load(path)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"null"])
def test_a_vocabulary_that_is_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a vocabulary file"):
        Vocabulary.load(path)


def test_a_member_with_a_size_below_zero_is_refused(tmp_path: Path) -> None:
    """Its reader would take the next header for the end: one of two samples lost without a word."""
    from data_toys import tar_of

    path = tar_of(tmp_path / "x.tar", [("a.txt", b"one"), ("b.txt", b"two")])
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"\xff" * 11 + b"\x00"  # base 256, below 0
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match="below 0|not a readable tar"):
        pack(path, tmp_path / "out", progress=False)
