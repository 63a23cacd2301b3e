"""Hugging Face datasets on disk, without the `datasets` package."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from data_toys import png

from mm.data.pack.job import pack
from mm.data.shards.reader import ShardSet
from mm.errors import UserError

LABELS = {"_type": "ClassLabel", "names": ["cat", "dog"]}


def save(folder: Path, rows: list[dict], split: str, features: dict | None = None) -> Path:
    """Write what `Dataset.save_to_disk` writes, in two Arrow streams."""
    folder.mkdir(parents=True)
    schema = pyarrow.Table.from_pylist(rows).schema
    files = []
    for n, part in enumerate((rows[::2], rows[1::2])):
        name = f"data-{n:05d}-of-00002.arrow"
        table = pyarrow.Table.from_pylist(part, schema)
        with pyarrow.OSFile(str(folder / name), "wb") as sink:
            with pyarrow.ipc.new_stream(sink, schema) as writer:
                writer.write_table(table, max_chunksize=3)
        files.append({"filename": name})
    state = {"_data_files": files, "_fingerprint": "a", "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features or {}}))
    return folder


def rows(n: int) -> list[dict]:
    return [
        {"picture": {"bytes": png(i), "path": None}, "label": i % 2, "who": f"p{i}"}
        for i in range(n)
    ]


def test_a_dataset_dict(tmp_path: Path) -> None:
    root = tmp_path / "set"
    features = {"label": LABELS}
    save(root / "train", rows(9), "train", features)
    save(root / "validation", rows(4), "validation", features)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    columns = {"image": "picture", "text": "label"}
    report = pack(root, tmp_path / "out", columns=columns, progress=False)
    assert report.samples == {"train": 9, "val": 4} and not report.quarantined
    shards = ShardSet.open(tmp_path / "out")
    order = [*range(0, 9, 2), *range(1, 9, 2)]  # file after file
    for i, n in enumerate(order):
        assert shards.raw(i, "image") == ("png", png(n))
        assert shards[i].values["text"] == ("cat", "dog")[n % 2]
        assert shards.meta(i) == {"who": f"p{n}"}
    assert pack(root, tmp_path / "out", columns=columns, progress=False).already


def test_one_dataset_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    one = save(tmp_path / "one", [{"text": f"line {i}", "key": f"k{i}"} for i in range(5)], "test")
    assert pack(one, tmp_path / "out", progress=False).samples == {"test": 5}
    assert ShardSet.open(tmp_path / "out", "test").key(0) == "k0"
    with pytest.raises(UserError, match="no column 'words' for modality 'text'"):
        pack(one, tmp_path / "x", columns={"text": "words"}, progress=False)
    arrow = one / "data-00001-of-00002.arrow"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="data-00001-of-00002.arrow: (cut short|not a readable)"):
        pack(one, tmp_path / "x", progress=False)
    arrow.unlink()
    with pytest.raises(UserError, match="data-00001-of-00002.arrow is missing"):
        pack(one, tmp_path / "x", progress=False)
    state = json.loads((one / "state.json").read_text()) | {"_indices_data_files": [{}]}
    (one / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="flatten_indices"):
        pack(one, tmp_path / "x", progress=False)


def test_what_datasets_itself_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    made = datasets.Dataset.from_dict(
        {"text": [f"t{i}" for i in range(7)], "label": [i % 2 for i in range(7)]}, features
    )
    split = made.train_test_split(test_size=2, seed=0)  # saved with its indices resolved
    split.save_to_disk(str(tmp_path / "set"))
    report = pack(tmp_path / "set", tmp_path / "out", progress=False)
    assert report.samples == {"train": 5, "test": 2}
    shards = ShardSet.open(tmp_path / "out", "test")
    for i, row in enumerate(split["test"]):
        assert shards[i].values["text"] == row["text"]
        assert shards.meta(i) == {"label": ("no", "yes")[row["label"]]}
