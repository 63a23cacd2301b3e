"""Large sets: handles are bounded, an index that is too large to be hashed is not believed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from data_toys import folder, token_shards, toys

from mm.data.pack.job import pack
from mm.data.pack.writer import write_manifest
from mm.data.shards import maps, reader
from mm.data.shards.index import Index, sha256
from mm.data.shards.manifest import read_manifest
from mm.data.shards.reader import ShardSet
from mm.errors import UserError


def test_few_shards_are_mapped_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each map takes a file handle: those unused for longest are given back."""
    src = folder(tmp_path / "src", 30, splits=("train",))
    pack(src, tmp_path / "out", tokenizers=toys(), progress=False, shard_mb=0.001)
    monkeypatch.setattr(maps, "MAPPED", 4)
    shards, whole = (ShardSet.open(tmp_path / "out", cache_mb=mb) for mb in (0, 512))
    assert len(shards.paths) >= 10
    before = len(os.listdir("/proc/self/fd"))
    for i in np.random.default_rng(0).integers(0, len(shards), 200).tolist():
        for m, ids in shards.tokens(i).items():
            assert ids.tolist() == whole.tokens(i)[m].tolist()
        assert len(shards._contents) <= 4
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    del ids  # a view of its map
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_that_is_not_hashed_is_held_against_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is that of the manifest; another length or offset is seen when a sample is read."""
    token_shards(tmp_path, 12)
    root, path = tmp_path / "tokens", tmp_path / "tokens/train/index.npz"
    copy = tmp_path / "index.npz"
    copy.write_bytes(path.read_bytes())  # what is mapped must not be written to
    sound = Index.load(copy, 9)
    expected = ShardSet.open(root).tokens(5)
    monkeypatch.setattr(reader, "HASHED", 0)
    opened = ShardSet.open(root)
    assert {m: ids.tolist() for m, ids in opened.tokens(5).items()} == {
        m: ids.tolist() for m, ids in expected.items()
    }
    shorter = sound.lengths["text"] - 1
    moved = sound.offset + 512
    columns = {name: getattr(sound, name) for name in Index._fields}
    for changed in ({"lengths": {**sound.lengths, "text": shorter}}, {"offset": moved}):
        Index(**{**columns, **changed}).save(path)
        with pytest.raises(UserError, match=r"index.npz: damaged .*run: mm data verify"):
            ShardSet.open(root).tokens(5)
    path.write_bytes(path.read_bytes() + b"more")
    assert ShardSet.open(root).tokens(5).keys() == expected.keys(), "made anew from the shards"


def test_a_split_of_many_shards_looks_at_each_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_shards(tmp_path, 12)
    root = tmp_path / "tokens"
    shard = root / "train" / ShardSet.open(root).paths[0].name
    os.truncate(shard, shard.stat().st_size - 512)
    with pytest.raises(UserError, match="tar: has .* bytes, the manifest says"):
        ShardSet.open(root)
    monkeypatch.setattr(reader, "CHECKED", 0)
    opened = ShardSet.open(root)
    with pytest.raises(UserError, match="tar: has .* bytes, the manifest says"):
        opened.tokens(0)


def test_an_index_of_before_is_read(tmp_path: Path) -> None:
    """Of a manifest that does not say the size of its index: it is hashed."""
    token_shards(tmp_path, 5)
    root = tmp_path / "tokens"
    manifest = read_manifest(root)
    del manifest["splits"]["train"]["index"]["bytes"]
    write_manifest(root, manifest)
    assert len(ShardSet.open(root)) == 5
    assert sha256(root / "train/index.npz") == manifest["splits"]["train"]["index"]["sha256"]
