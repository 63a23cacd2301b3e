"""Files as bytes: packed, read, measured and written as they are."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
from data_toys import wav
from PIL import Image

from mm.cli.tokenizer import read_raws
from mm.data.modalities.base import BadSample, get_modality, modality_of_value
from mm.data.modalities.file import FileModality
from mm.data.pack.job import pack
from mm.data.shards.inspect import inspect
from mm.data.shards.reader import ShardSet
from mm.decoders.media import save_media
from mm.errors import UserError
from mm.registry import MODALITIES
from mm.specs import FileBytes
from mm.tokenizers.evaluate import evaluate
from mm.tokenizers.text.bytes import BytesConfig


class Midi(FileModality):
    kind: Literal["midi"] = "midi"  # type: ignore[assignment]
    extensions: ClassVar[tuple[str, ...]] = ("mid", "midi")


@pytest.fixture(autouse=True)
def midi(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line of the registry, for a test alone."""
    monkeypatch.setitem(MODALITIES._modules, "midi", __name__)
    monkeypatch.setitem(MODALITIES._classes, "midi", Midi)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three samples: a JPEG, a recording, a file that nothing decodes, a caption."""
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (6, 5, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        (folder / f"{i}.wav").write_bytes(wav())
        (folder / f"{i}.mid").write_bytes(bytes([i, 0, 255, 10]) * 3)
        (folder / f"{i}.txt").write_text(f"caption {i}")
    return folder


def test_the_ids_are_the_bytes_of_the_files(source: Path, tmp_path: Path) -> None:
    tokenizers = {m: BytesConfig(modality=m).build() for m in ("image", "audio", "midi", "bytes")}
    raw = tmp_path / "raw"
    pack(source, raw, progress=False)
    pack(raw, tmp_path / "twice", tokenizers=tokenizers, progress=False)
    pack(source, tmp_path / "once", tokenizers=tokenizers, progress=False)
    endings = {"image": "jpg", "audio": "wav", "midi": "mid", "bytes": "txt"}
    for name in ("once", "twice"):
        shards = ShardSet.open(tmp_path / name)
        for i in range(3):
            for modality, ids in shards.tokens(i).items():
                file = source / f"{shards.key(i)}.{endings[modality]}"
                assert bytes(ids.astype(np.uint8)) == file.read_bytes(), (name, file)
    shards = ShardSet.open(raw)
    assert shards[0].values["image"].shape == (6, 5, 3)
    shards.tokenizers = tokenizers  # as a task opens it
    assert shards[0].values["image"] == (source / f"{shards.key(0)}.jpg").read_bytes()
    assert shards[0].values["text"] == f"caption {shards.key(0)}"
    found = inspect(tmp_path / "once", tokenizers=dict(tokenizers), out=tmp_path / "seen")
    assert found["examples"]["image"]["what"].startswith("5x6 pixels")
    assert found["examples"]["image"]["file"].endswith(".jpg")
    for modality, tokenizer in tokenizers.items():
        figures = evaluate(tokenizer, read_raws(raw, "train", tokenizer, 9))
        assert figures["exact_round_trip_share"] == 1.0 and figures["bytes_per_token"] == 1.0
        assert ("fertility_tokens_per_word" in figures) is (modality == "bytes")


def test_a_damaged_picture_is_no_sample_for_bytes_either(source: Path, tmp_path: Path) -> None:
    (source / "1.jpg").write_bytes((source / "1.jpg").read_bytes()[:40])
    tokenizer = {"image": BytesConfig(modality="image").build()}
    report = pack(source, tmp_path / "out", tokenizers=tokenizer, progress=False)
    assert report.quarantined == 1


def test_files_that_nothing_decodes_are_no_text(tmp_path: Path) -> None:
    own = get_modality("midi")
    value = own.decode(b"MThd")
    assert modality_of_value(value).kind == modality_of_value(copy.copy(value)).kind == "midi"
    assert modality_of_value(pickle.loads(pickle.dumps(value))).kind == "midi"
    assert modality_of_value(b"a").kind == modality_of_value(FileBytes(b"a", "text")).kind == "text"
    assert own.accept(bytearray(b"ab")) == b"ab" and own.line(b"\x01\x02") == "2 bytes: 01 02"
    with pytest.raises(BadSample, match="midi: 3 bytes, not 1 to 2"):
        get_modality("midi", {"max_file_bytes": 2}).decode(b"abc")
    with pytest.raises(BadSample, match="a list is not FileBytes"):
        own.accept([1])
    assert save_media(value, tmp_path / "new").name == "new.mid"
    assert save_media(b"MThd", tmp_path / "x.smf", "midi").read_bytes() == b"MThd"
    with pytest.raises(UserError, match=".png is of image; midi is written as .mid, .midi"):
        own.check_ending(Path("x.png"))
