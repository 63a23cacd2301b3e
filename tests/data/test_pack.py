"""Packing from every kind of source, and what it refuses."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
import typer.core
import typer.main
from data_toys import ToyTokenizer, folder, png, tar_of, token_shards, toys, wav

from mm.cli.data import full_app
from mm.data.pack.config import PackConfig
from mm.data.pack.job import pack
from mm.data.pack.writer import secure_webdataset
from mm.data.shards.inspect import inspect
from mm.data.shards.reader import ShardSet
from mm.data.shards.verify import verify
from mm.data.sources.text import split_documents
from mm.errors import UserError
from mm.specs import Waveform
from mm.vocabulary import Vocabulary


def quiet(src: Path, out: Path, **kw):
    return pack(src, out, progress=False, **kw)


def test_folder_end_to_end(tmp_path: Path) -> None:
    src = folder(tmp_path / "src")
    report = quiet(src, tmp_path / "out", license="CC0")
    assert report.samples == {"train": 6, "test": 6}
    assert report.modalities == {"text": 12, "image": 12, "audio": 12}
    shards = ShardSet.open(tmp_path / "out", split="test")
    assert len(shards) == 6 and shards.modalities == ("text", "image", "audio")
    sample = shards[2]
    assert sample.key == "test/item002" and sample.values["text"] == "test caption 2"
    image, sound = sample.values["image"], sample.values["audio"]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    assert isinstance(sound, Waveform) and sound.sample_rate == 8000 and len(sound.samples) == 400
    assert shards.raw(2, "image") == ("png", png(2)), "the file itself is kept, byte by byte"
    assert shards.lengths("audio").tolist() == [400] * 6
    assert shards.lengths("image").tolist() == [64] * 6
    assert shards[-1].key == shards[5].key
    with pytest.raises(IndexError):
        shards[6]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["license"] == "CC0" and manifest["splits"]["train"]["samples"] == 6
    assert not (tmp_path / "out/quarantine.jsonl").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    quiet(folder(tmp_path / "src"), tmp_path / "out", shard_mb=0.01)
    webdataset = secure_webdataset()
    paths = sorted(str(p) for p in (tmp_path / "out/train").glob("*.tar"))
    assert len(paths) > 1
    found = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [s["__key__"] for s in found] == [f"train/item{i:03d}" for i in range(6)]
    assert all({"txt", "png", "wav"} <= set(s) for s in found)


def test_tar_and_folder_give_the_same_shards(tmp_path: Path) -> None:
    src = folder(tmp_path / "src")
    files = sorted(p for p in src.rglob("*") if p.is_file())
    tar_of(tmp_path / "src.tar", [(p.relative_to(src).as_posix(), p.read_bytes()) for p in files])
    quiet(src, tmp_path / "a")
    quiet(tmp_path / "src.tar", tmp_path / "b")
    name = "train/shard-000000.tar"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_caption_from_parent_and_from_the_file_name(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "tabby_cat"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            (tmp_path / "pets" / split / name / "0001.png").write_bytes(png())
    quiet(tmp_path / "pets", tmp_path / "a", caption_from="parent")
    shards = ShardSet.open(tmp_path / "a", "test")
    assert [shards[i].values["text"] for i in range(2)] == ["cat", "tabby cat"]
    assert shards.meta(1) == {"label": "tabby cat"}

    (tmp_path / "speech").mkdir()
    for name in ("7_ann_0", "2_bob_1"):
        (tmp_path / "speech" / f"{name}.wav").write_bytes(wav())
    given = {
        "caption_regex": r"^(?P<text>\d)_(?P<speaker>\w+)_",
        "caption_map": {"7": "seven", "2": "two"},
    }
    quiet(tmp_path / "speech", tmp_path / "b", **given)
    shards = ShardSet.open(tmp_path / "b")
    assert [shards[i].values["text"] for i in range(2)] == ["two", "seven"]
    assert shards.meta(0) == {"label": "two", "speaker": "bob"}
    with pytest.raises(UserError, match="has no group"):
        quiet(tmp_path / "speech", tmp_path / "c", caption_regex=r"^\d_")
    with pytest.raises(UserError, match="--caption-from means nothing for a source of kind 'text'"):
        (tmp_path / "a.txt").write_text("x")
        quiet(tmp_path / "a.txt", tmp_path / "d", caption_from="parent")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_manifests(tmp_path: Path, kind: str) -> None:
    (tmp_path / "files").mkdir()
    rows = []
    for i in range(5):
        (tmp_path / "files" / f"{i}.png").write_bytes(png(i))
        rows.append(
            {"key": f"k{i}", "img_path": f"files/{i}.png", "says": f"line, {i}\nmore", "who": "ann"}
        )
        rows[-1]["split"] = "validation" if i == 4 else "train"
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        for row in rows:  # bytes in the table itself, as Hugging Face data sets have them
            row["img_path"] = {"bytes": (tmp_path / row["img_path"]).read_bytes(), "path": "x.png"}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    report = quiet(path, tmp_path / "out", columns={"image": "img_path", "text": "says"})
    assert report.samples == {"train": 4, "val": 1}
    shards = ShardSet.open(tmp_path / "out", "val")
    assert shards[0].key == "k4" and shards[0].values["text"] == "line, 4\nmore"
    assert shards.raw(0, "image") == ("png", png(4)) and shards.meta(0) == {"who": "ann"}
    with pytest.raises(
        UserError, match="no column 'picture' for modality 'image'; columns: key, img_path"
    ):
        quiet(path, tmp_path / "out2", columns={"image": "picture"})
    with pytest.raises(
        UserError,
        match="no column called text, .* time_series or array; columns: key, img_path",
    ):
        quiet(path, tmp_path / "out2")
    with pytest.raises(UserError, match="unknown modality; did you mean 'image'"):
        quiet(path, tmp_path / "out2", columns={"imag": "img_path"})


def test_jsonl_inline_text_text_file_and_missing_values(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("from a file")
    rows = [{"text": "inline"}, {"text": {"path": "long.txt"}}, {"text": "both", "image": "a.png"}]
    (tmp_path / "a.png").write_bytes(png())
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    quiet(path, tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    assert [shards[i].values["text"] for i in range(3)] == ["inline", "from a file", "both"]
    assert shards.having("image").tolist() == [2] and "image" not in shards[0].values


def test_a_folder_with_a_manifest_is_read_through_it(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "a.png").write_bytes(png())
    (src / "stray.png").write_bytes(png(1))
    (src / "manifest.jsonl").write_text(json.dumps({"key": "only", "image": "a.png"}) + "\n")
    assert quiet(src, tmp_path / "out").samples == {"train": 1}


def test_one_text_file_is_cut_and_joins_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paragraphs = ["ä" * int(n) + ". " + "wörd " * int(n) for n in rng.integers(1, 40, 200)]
    text = "\n\n".join(paragraphs) + "\n\n\n" + "x" * 500 + "漢" * 300
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    report = quiet(tmp_path / "book.txt", tmp_path / "out", document_bytes=256, val_share=0.1)
    assert set(report.samples) == {"train", "val"}
    parts = []
    for split in ("train", "val"):
        shards = ShardSet.open(tmp_path / "out", split)
        assert shards.lengths("text").max() <= 256
        parts += [shards[i].values["text"] for i in range(len(shards))]
    assert "".join(parts) == text
    assert sum(p.endswith("\n\n") for p in parts) > 0.5 * len(parts), (
        "cuts fall on paragraph borders"
    )
    assert 0.05 < report.samples["val"] / sum(report.samples.values()) < 0.15
    one = list(split_documents(iter([b"a"]), 16))
    assert one == [b"a"], "one file of one letter works"


def test_rerun_is_safe_and_a_change_needs_overwrite(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 3)
    begun = time.monotonic()
    first = quiet(src, tmp_path / "out")
    assert first.seconds <= time.monotonic() - begun
    before = (tmp_path / "out/manifest.json").read_bytes()
    again = quiet(src, tmp_path / "out")
    assert again.already and not first.already and again.samples == first.samples
    assert again.seconds == 0 < first.seconds
    assert quiet(src, tmp_path / "new/folder/out").samples == first.samples
    (src / "train/item000.txt").write_text("train caption X")
    for change in ({}, {"shard_mb": 1.0}):
        with pytest.raises(UserError, match="--overwrite"):
            quiet(src, tmp_path / "out", **change)
    assert (tmp_path / "out/manifest.json").read_bytes() == before
    quiet(src, tmp_path / "out", overwrite=True)
    assert ShardSet.open(tmp_path / "out")[0].values["text"] == "train caption X"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.doc").write_text("dear")
    with pytest.raises(UserError, match="is no packed data"):
        quiet(src, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/thesis.doc").read_text() == "dear"
    with pytest.raises(UserError, match="lies in the source"):
        quiet(src, src / "out")


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 4)
    quiet(src, tmp_path / "a", workers=1)
    quiet(src, tmp_path / "b", workers=4)
    for path in sorted(p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_what_a_killed_run_left_is_cleaned(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 2)
    stale, moved = tmp_path / ".out.part-999999999", tmp_path / ".out.old-999999999"
    quiet(src, moved)
    stale.mkdir()
    report = quiet(src, tmp_path / "out", overwrite=True)
    assert report.samples == {"train": 2, "test": 2}
    assert not stale.exists() and not moved.exists()


def test_val_share_is_a_fixed_part_of_train(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 60, splits=("train",))
    report = quiet(src, tmp_path / "out", val_share=0.25)
    assert 5 <= report.samples["val"] <= 25 and sum(report.samples.values()) == 60
    keys = [
        {s.key(i) for i in range(len(s))}
        for s in (ShardSet.open(tmp_path / "out", x) for x in ("train", "val"))
    ]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 60


def test_nothing_to_pack(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no text, .* time_series or array file .it is empty."):
        quiet(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty/notes.doc").write_text("x")
    with pytest.raises(UserError, match=r"it has: 1 x \.doc"):
        quiet(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="no such file or folder"):
        quiet(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UserError, match="is no source"):
        quiet(tmp_path / "a.xlsx", tmp_path / "out")
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(UserError, match="empty file"):
        quiet(tmp_path / "none.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_from_shards(tmp_path: Path) -> None:
    report = token_shards(tmp_path, 37)
    assert report.kind == "tokens" and report.modalities == {"text": 37, "image": 27, "audio": 27}
    shards = ShardSet.open(tmp_path / "tokens")
    raw = ShardSet.open(tmp_path / "shards")
    assert len(shards.paths) > 1, "several shards are in play"
    tokenizers = toys()
    assert shards.specs == tuple(t.spec for t in tokenizers.values())
    for i in range(len(shards)):
        sample, codes = raw[i], shards.read_encoded(i)
        assert raw.key(i) == shards.key(i) and set(codes) == set(sample.values)
        assert shards.meta(i) == {"label": i % 3}
        for modality, code in codes.items():
            expected = tokenizers[modality].encode([sample.values[modality]])[0]
            assert code.ids.dtype == np.int32
            np.testing.assert_array_equal(code.ids, expected.ids)
            assert dict(code.side) == {k: int(v) for k, v in expected.side.items()}
            assert shards.lengths(modality)[i] == len(code.ids)
    assert Vocabulary.load(tmp_path / "tokens/vocabulary.json") == shards.vocabulary
    assert verify(tmp_path / "tokens")["ok"]
    with pytest.raises(UserError, match="raw shards have no tokens"):
        raw.read_encoded(0)
    with pytest.raises(UserError, match="token shards hold no raw values"):
        quiet(tmp_path / "tokens", tmp_path / "again", tokenizers=toys())


def test_a_repeated_file_is_encoded_once(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "a.png").write_bytes(png())
    rows = [{"image": "a.png", "text": f"caption {i % 2}"} for i in range(600)]
    (src / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizers = toys()
    quiet(src / "rows.jsonl", tmp_path / "out", tokenizers=tokenizers)
    assert tokenizers["image"].seen == 1 and tokenizers["text"].seen == 2
    assert len(ShardSet.open(tmp_path / "out")) == 600


def test_the_vocabulary_is_appended_to(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 2)
    quiet(src, tmp_path / "a", tokenizers={"image": ToyTokenizer("image")})
    old = Vocabulary.load(tmp_path / "a/vocabulary.json")
    report = quiet(
        src,
        tmp_path / "b",
        tokenizers=toys() | {"image": ToyTokenizer("image")},
        vocabulary=tmp_path / "a/vocabulary.json",
    )
    assert report.left_out == ()
    new = Vocabulary.load(tmp_path / "b/vocabulary.json")
    assert new.modalities == ("image", "text", "audio") and old.is_prefix_of(new)
    with pytest.raises(UserError, match="is taken by tokenizer"):
        quiet(src, tmp_path / "c", tokenizers={"image": ToyTokenizer("image", 8)}, vocabulary=old)
    with pytest.raises(UserError, match="'picture' is given a tokenizer of 'image'"):
        quiet(src, tmp_path / "c", tokenizers={"picture": ToyTokenizer("image")})
    partly = quiet(src, tmp_path / "d", tokenizers={"image": ToyTokenizer("image")})
    assert partly.left_out == ("audio", "text")


def test_real_bytes_tokenizer_from_a_folder(tmp_path: Path) -> None:
    from mm.tokenizers.text.bytes import BytesConfig

    BytesConfig().build().save(tmp_path / "tokenizers/bytes")
    BytesConfig(modality="text").build().save(tmp_path / "tokenizers/text")
    src = folder(tmp_path / "src", 2)
    quiet(src, tmp_path / "out", tokenizers=tmp_path / "tokenizers")
    codes = ShardSet.open(tmp_path / "out").read_encoded(0)
    for modality in ("bytes", "text"):
        assert bytes(codes[modality].ids.astype(np.uint8)) == b"train caption 0"
    with pytest.raises(UserError, match="no tokenizers at"):
        quiet(src, tmp_path / "x", tokenizers=tmp_path / "nowhere")
    with pytest.raises(UserError, match="no sub-folder holds a tokenizer"):
        quiet(src, tmp_path / "x", tokenizers=src)
    found = inspect(tmp_path / "out", tokenizers=tmp_path / "tokenizers", out=tmp_path / "look")
    assert "train caption 0" in found["examples"]["text"]["what"]
    assert Path(found["examples"]["bytes"]["file"]).read_bytes() == b"train caption 0"


def test_inspect_raw(tmp_path: Path) -> None:
    quiet(folder(tmp_path / "src"), tmp_path / "out")
    found = inspect(tmp_path / "out", out=tmp_path / "look", split="test", sample=1)
    json.dumps(found)
    assert found["splits"]["train"]["modalities"]["audio"] == {
        "count": 6, "total": 2400, "min": 400, "max": 400, "mean": 400.0, "unit": "frames",
    }  # fmt: skip
    assert found["examples"]["text"] == {
        "key": "test/item001", "metadata": {}, "what": "14 characters: test caption 1",
        "file": str(tmp_path / "look/text-test-000001.txt"),
    }  # fmt: skip
    assert (tmp_path / "look/image-test-000001.png").read_bytes()[:4] == b"\x89PNG"
    assert found["examples"]["audio"]["what"].startswith("0.050 s at 8000 Hz")
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        inspect(tmp_path / "out", split="tset")


def test_every_setting_is_an_option_and_no_other_is_taken(tmp_path: Path) -> None:
    command = typer.main.get_command(full_app())
    assert isinstance(command, typer.core.TyperGroup)
    options = {p.name: p.opts for p in command.commands["pack"].params}
    assert {*options} - {"json", "help"} == {*PackConfig.model_fields} - {"limits"}
    assert options["columns"] == ["--column"] and options["out"] == ["--out", "-o"]
    with pytest.raises(UserError, match="unknown key 'max_bat'; did you mean 'max_bad'"):
        pack(tmp_path, tmp_path.parent / "x", max_bat=1)
    with pytest.raises(UserError, match="--split Train: use a plain lower-case word"):
        pack(tmp_path, tmp_path.parent / "x", split="Train")


def test_limits_stand_in_the_manifest_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    quiet(tmp_path / "a.txt", tmp_path / "out", limits={"audio": {"min_seconds": 0.5}})
    names = list(json.loads((tmp_path / "out/manifest.json").read_text())["settings"]["limits"])
    assert names == sorted(names) and "audio.min_seconds" in names
