"""`mm data pack --copies`: varied copies of training samples, and of no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import mm
from mm.data.modalities.audio import AudioModality
from mm.data.modalities.image import ImageModality
from mm.data.shards.manifest import read_manifest
from mm.data.shards.reader import ShardSet
from mm.errors import UserError
from mm.specs import Waveform


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight cut-outs of a real photograph with captions, two of them held out."""
    root = tmp_path_factory.mktemp("copies")
    photo = load_sample_images().images[0]
    for i in range(8):
        folder = root / "raw" / ("val" if i < 2 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        part = photo[40 * i : 40 * i + 64, 60 * i : 60 * i + 64]
        Image.fromarray(part).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"part {i}")
    mm.pack(root / "raw", root / "data")
    return root / "data"


def test_only_training_samples_are_copied(packed: Path, tmp_path: Path) -> None:
    mm.pack(packed, tmp_path / "out", copies=3)
    train, val = (ShardSet.open(tmp_path / "out", split) for split in ("train", "val"))
    assert len(train) == 3 * 6 and len(val) == 2
    for i in range(len(train)):
        key, _, number = train.key(i).partition("~")
        first = next(j for j in range(len(train)) if train.key(j) == key)
        sample, original = train[i].values, train[first].values
        assert sample["text"] == original["text"]
        same = np.array_equal(sample["image"], original["image"])
        assert same == (not number), train.key(i)
        assert sample["image"].shape == original["image"].shape


def test_settings_stand_in_the_manifest_where_they_are_not_the_default(
    packed: Path, tmp_path: Path
) -> None:
    """A pack of before the setting existed is the same pack."""
    mm.pack(packed, tmp_path / "out", copies=2, dedupe="image")
    settings = [read_manifest(folder)["settings"] for folder in (packed, tmp_path / "out")]
    assert not {"copies", "dedupe"} & settings[0].keys()
    assert (settings[1]["copies"], settings[1]["dedupe"]) == (2, "image")


def test_copies_are_the_same_every_time(packed: Path, tmp_path: Path) -> None:
    made = []
    for name, workers in (("a", 1), ("b", 2)):
        mm.pack(packed, tmp_path / name, copies=2, workers=workers)
        shards = ShardSet.open(tmp_path / name, "train")
        made.append([shards.raw(i, "image") for i in range(len(shards))])
    assert made[0] == made[1]


def test_copies_of_raw_files_are_refused(packed: Path, tmp_path: Path) -> None:
    """Their split is not known yet: a copy of a held-out sample could be trained on."""
    with pytest.raises(UserError, match="--copies 2: .* pack .* first"):
        mm.pack(packed.parent / "raw", tmp_path / "out", copies=2)


def test_a_gray_picture_is_not_mirrored() -> None:
    """It may be writing. One bright side stays on its side."""
    raw = np.zeros((32, 32, 3), np.uint8)
    raw[:, :10] = 255
    own = ImageModality()
    file = png(raw)
    for key in range(20):
        moved = own.decode(own.vary(file, key)).mean(axis=(0, 2))
        assert moved[:8].mean() > moved[-8:].mean()
    raw[:, :10, 2] = 0  # with colour it may be
    sides = [own.decode(own.vary(png(raw), key)).mean(axis=(0, 2)) for key in range(20)]
    assert {bool(s[:8].mean() > s[-8:].mean()) for s in sides} == {True, False}


def png(raw: np.ndarray) -> bytes:
    import io

    out = io.BytesIO()
    Image.fromarray(raw).save(out, "PNG")
    return out.getvalue()


def test_a_recording_changes_its_speed(tmp_path: Path) -> None:
    own = AudioModality()
    own.save(Waveform(np.sin(np.arange(8000) / 5).astype(np.float32), 8000), tmp_path / "a.wav")
    file = (tmp_path / "a.wav").read_bytes()
    lengths = {len(own.decode(own.vary(file, key)).samples) for key in range(20)}
    assert len(lengths) > 10 and min(lengths) > 7300 and max(lengths) < 8800
