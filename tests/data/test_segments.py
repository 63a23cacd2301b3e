"""Interleaved samples: packed, read back, tokenised and trained on, segment by segment."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import ToyTokenizer, folder, png, toys, wav

from mm.config import validate
from mm.data.batching.collate import to_batch
from mm.data.pack.job import pack
from mm.data.pack.report import PackReport
from mm.data.pack.writer import secure_webdataset
from mm.data.shards.inspect import inspect
from mm.data.shards.members import member_modality
from mm.data.shards.reader import QUARANTINE, VOCABULARY, ShardSet
from mm.data.shards.verify import verify
from mm.data.streams.bucketed import BucketedConfig
from mm.data.streams.packed import PackedConfig
from mm.data.streams.raw_items import ItemsConfig
from mm.data.streams.stateful import StatefulConfig
from mm.errors import UserError
from mm.model.model import Model
from mm.run import Run
from mm.trainer.log import metrics
from mm.trainer.loop import train
from mm.vocabulary import Vocabulary

# Modalities of sample i: several of one, in another order each time.
ORDERS = (
    ("text", "image", "text", "audio", "text"),
    ("image", "image", "text"),
    ("text",),
    ("audio", "text", "image", "text", "image"),
)
N = 24


def quiet(src: Path, out: Path, **kw: Any) -> PackReport:
    return pack(src, out, progress=False, **kw)


def rows(root: Path, n: int = N) -> list[dict[str, Any]]:
    """``n`` rows of a manifest with a list of segments; files in ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    out = []
    for i in range(n):
        segments = []
        for k, modality in enumerate(ORDERS[i % len(ORDERS)]):
            value = f"turn {k} of {i}"
            if modality != "text":
                value = f"{i}-{k}.{'png' if modality == 'image' else 'wav'}"
                made = png(10 * i + k) if modality == "image" else wav(10 * i + k, 200)
                (root / value).write_bytes(made)
            segments.append({modality: value})
        out.append({"key": f"talk{i:02d}", "segments": segments, "speaker": i % 2})
    return out


def jsonl(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("segments")
    quiet(jsonl(root / "talks.jsonl", rows(root)), root / "shards", shard_mb=0.02)
    quiet(root / "shards", root / "tokens", tokenizers=toys(), shard_mb=0.01)
    return root


def test_members_have_ordinal_names_in_the_order_of_the_segments(data: Path) -> None:
    shards = ShardSet.open(data / "shards")
    with tarfile.open(shards.paths[0]) as tar:
        names = [n for n in tar.getnames() if n.startswith("talk00.")]
    endings = ("000.txt", "001.png", "002.txt", "003.wav", "004.txt", "json")
    assert names == [f"talk00.{e}" for e in endings]
    for i in range(N):
        sample = shards[i]
        assert [member_modality(member) for member in sample.values] == list(ORDERS[i % 4])
        for k, (member, value) in enumerate(sample.values.items()):
            if member.endswith("text"):
                assert value == f"turn {k} of {i}"
            raw = shards.raw(i, member)
            assert raw is not None and raw[0] in ("txt", "png", "wav")
            if member.endswith("image"):
                assert raw[1] == png(10 * i + k)
    assert shards.meta(3) == {"speaker": 1}
    assert shards.segments("image").tolist() == [ORDERS[i % 4].count("image") for i in range(N)]
    # What another program sees: one sample, its members in order.
    wds = secure_webdataset()
    first = next(iter(wds.WebDataset(str(shards.paths[0]), shardshuffle=False)))
    assert first["__key__"] == "talk00" and first["002.txt"] == b"turn 2 of 0"
    assert verify(data / "shards")["ok"] and verify(data / "tokens")["ok"]


def test_parquet_folder_and_jsonl_give_the_same_samples(data: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = tmp_path / "talks.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(tmp_path)), table)
    quiet(table, tmp_path / "a")
    files = tmp_path / "files"
    files.mkdir()
    own = ShardSet.open(data / "shards")
    for i in range(N):
        for member in own.members(i):
            kind, content = own.raw(i, member) or ("", b"")
            (files / f"{own.key(i)}.{member[:3]}.{kind}").write_bytes(content)
    (files / "talk90.000.txt").write_text("two")
    (files / "talk90.000.png").write_bytes(png())
    report = quiet(files, tmp_path / "b", segments=True, max_bad=0.5)
    assert report.rejected == {"two files of segment *": 1}
    for other in (ShardSet.open(tmp_path / "a"), ShardSet.open(tmp_path / "b")):
        assert len(other) == N
        for i in range(N):
            assert other.key(i) == own.key(i) and list(other.members(i)) == list(own.members(i))
            assert all(other.raw(i, s) == own.raw(i, s) for s in own.members(i))
    # Without the setting, they are files of their own.
    assert quiet(files, tmp_path / "c").samples["train"] > 2 * N
    with pytest.raises(UserError, match="--segments means nothing for a source of kind 'parquet'"):
        quiet(table, tmp_path / "d", segments=True)


def test_a_bad_segment_is_named(tmp_path: Path) -> None:
    good = rows(tmp_path, 4)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG no image")
    bad = [
        [{"text": "a"}, {"image": "gone.png"}],
        [{"text": "a"}, {"text": "b"}, {"image": "bomb.png"}],
        [{"text": "a", "image": "0-1.png"}],
        [{"text": "a"}, {"picture": "0-1.png"}],
        [{"text": "a"}, {"text": ""}],
        [{"image": "../out.png"}],
        [],
        "text",
        [{"text": "x"}] * 1001,
    ]
    made = [{"key": f"bad{i}", "segments": s} for i, s in enumerate(bad)]
    report = quiet(jsonl(tmp_path / "a.jsonl", [*good, *made]), tmp_path / "out", max_bad=0.9)
    assert report.samples == {"train": 4} and report.quarantined == len(bad)
    lines = (tmp_path / "out" / QUARANTINE).read_text().splitlines()
    said = {row["key"]: row["reason"] for row in map(json.loads, lines)}
    assert said["bad0"] == "segment 1: 'gone.png': no such file"
    assert said["bad1"].startswith("segment 2: image: unreadable header")
    assert said["bad2"].startswith(
        "segment 0: expected one of array, audio, image, text, time_series, video"
    )
    assert "found picture" in said["bad3"] and said["bad4"].startswith("segment 1: expected one")
    assert "leads out of" in said["bad5"] and "found []" in said["bad6"]
    assert "found 'text'" in said["bad7"] and "1001 of them, the cap is 1000" in said["bad8"]
    # Decoding happens while tokenising too: the same words.
    report = quiet(tmp_path / "a.jsonl", tmp_path / "tokens", tokenizers=toys(), max_bad=0.9)
    assert report.samples == {"train": 4} and report.quarantined == len(bad)
    lines = (tmp_path / "tokens" / QUARANTINE).read_text().splitlines()
    assert any("segment 2: image: unreadable" in json.loads(line)["reason"] for line in lines)


def test_a_segments_column_beside_text_stays_metadata(tmp_path: Path) -> None:
    """Transcripts have one with time stamps; it must be asked for."""
    row = {"key": "a", "text": "hello", "segments": [{"text": "hello", "start": 0.5}]}
    quiet(jsonl(tmp_path / "a.jsonl", [row]), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    assert shards[0].values == {"text": "hello"} and "segments" in shards.meta(0)
    with pytest.raises(UserError, match="--column segments=segments holds whole samples"):
        columns = {"segments": "segments", "text": "text"}
        quiet(tmp_path / "a.jsonl", tmp_path / "b", columns=columns)


def test_tokens_are_those_of_each_segment(data: Path) -> None:
    shards, raw = ShardSet.open(data / "tokens"), ShardSet.open(data / "shards")
    own: dict[str, ToyTokenizer] = toys()
    for i in range(N):
        codes = shards.read_encoded(i)
        assert list(codes) == list(raw.members(i))
        for member, code in codes.items():
            want = own[member_modality(member)].encode([raw.value(i, member)])[0]
            assert np.array_equal(code.ids, want.ids)
            assert code.side == {} or code.side["sample_rate"] == want.side["sample_rate"]
        for modality in own:
            mine = [len(c.ids) for s, c in codes.items() if member_modality(s) == modality]
            assert shards.lengths(modality)[i] == (sum(mine) if mine else -1)
    found = inspect(data / "tokens", sample=0)
    assert found["examples"]["image"]["segments"] == "text 11, image 4, text 11, audio 5, text 11"
    assert inspect(data / "shards")["examples"]["audio"]["what"].startswith("0.025 s at 8000 Hz")


def spans(v: Vocabulary, codes: Mapping[str, np.ndarray]) -> list[int]:
    """A document's ids: begin, codes and end of each segment."""
    out: list[int] = []
    for member, ids in codes.items():
        r = v.range(member_modality(member))
        out += [r.begin, *(np.asarray(ids) + r.first).tolist(), r.end]
    return out


def test_one_document_a_sample_with_a_span_for_each_segment(data: Path) -> None:
    config = PackedConfig(
        sources=({"path": data / "tokens"},), seq_len=96, batch_size=3, block_samples=N, prefetch=0
    )
    stream = config.build(seed=1)
    shards = ShardSet.open(data / "tokens")
    v = shards.vocabulary
    assert v is not None
    by_key = {shards.key(i): shards.tokens(i) for i in range(N)}
    (b,) = stream.next()
    keys = list(b.keys)
    for row in range(3):
        document = b.layout.fields.document[row].numpy()
        for m in np.unique(document[document > 0]):
            here = np.flatnonzero(document == m)
            want = spans(v, by_key[keys.pop(0)])
            assert b.ids[row, here, 0].tolist() == want
            # Every code and every end is a target, of its own modality; no begin is.
            weight = b.weight[row, here].numpy()
            begins = np.isin(np.array(want[1:]), [v.range(s).begin for s in v.modalities])
            assert np.array_equal(weight[:-1] > 0, ~begins) and weight[-1] == 0
            goal = b.labels["target_modality"][row, here[:-1]].numpy()
            assert np.array_equal(goal, v.modality_of(np.array(want[1:])))
    assert not keys and stream.stats["documents"] == len(b.keys) > 3
    buckets = BucketedConfig(source={"path": data / "tokens"}, buckets=4, batch_size=4)
    other = buckets.build(seed=1)
    whole = [sum(len(ids) + 2 for ids in by_key[shards.key(i)].values()) for i in range(N)]
    assert other._lengths_of(np.arange(N))[1].tolist() == whole
    other.close()
    tokens = {"path": data / "tokens"}
    stateful = StatefulConfig(source=tokens, seq_len=96, batch_size=4, prefetch=0)
    (b,) = stateful.build(seed=1).next()
    first = b.ids[0, b.layout.fields.document[0] == 1, 0].numpy()
    want = spans(v, by_key[b.keys[0]])
    assert first.tolist() == want[: len(first)] and len(first) > 0


def test_items_of_interleaved_samples(data: Path) -> None:
    """Tokenizers train on every picture of a sample."""
    stream = ItemsConfig(path=data / "shards", size=8, batch_size=5, prefetch=0).build(seed=0)
    assert len(stream) == sum(ORDERS[i % 4].count("image") for i in range(N))
    seen = {
        png_bytes.tobytes() for png_bytes in (stream.reader.item(i) for i in range(len(stream)))
    }
    assert len(seen) == len(stream)
    (b,) = stream.next()
    assert b.values["image"].data.shape == (5, 3, 8, 8)


def test_trains_with_document_masks(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of a language model with attention and a recurrence.

    A loss for each modality, and no document sees the one before it in its row.
    """
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = validate(
        Run,
        {
            "name": "talks",
            "out": data / "runs",
            "vocabulary": data / "tokens" / VOCABULARY,
            "model": {
                "kind": "lm",
                "d_model": 16,
                "backbone": {"kind": "stack", "pattern": "attention rg_lru"},
            },
            "stages": [
                {
                    "data": {
                        "kind": "packed",
                        "sources": [{"path": data / "tokens"}],
                        "seq_len": 96,
                        "batch_size": 4,
                        "block_samples": N,
                    },
                    "objective": {"kind": "next_token"},
                    "budget": {"steps": 3},
                }
            ],
            "engine": {"zero_stage": 0, "precision": "fp32"},
        },
        "test",
    )
    train(run)
    last = metrics.read(run.folder / "metrics.jsonl")
    assert len(last) == 3
    for row in last:
        assert all(np.isfinite(row[f"loss/{m}"]) for m in ("text", "image", "audio"))
        shares = [row[f"data/token_shares/{m}"] for m in ("text", "image", "audio")]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0
    model = Model.from_pretrained(run.folder)
    vocabulary = model.vocabulary
    shards = ShardSet.open(data / "tokens")
    stream = PackedConfig(sources=({"path": data / "tokens"},), seq_len=96).build()
    documents = [stream.read_sample(0, 0, i) for i in (0, 1, 2)]
    stream.close()
    assert shards.vocabulary == vocabulary
    with torch.no_grad():
        together = model(to_batch([documents], vocabulary)).hidden[0]
        alone = [model(to_batch([[d]], vocabulary)).hidden[0] for d in documents]
    torch.testing.assert_close(together, torch.cat(alone))


def test_any_to_any_leaves_interleaved_samples_alone(data: Path) -> None:
    source = {"path": data / "tokens", "transform": [{"kind": "any_to_any", "tasks": {"text": 1}}]}
    stream = PackedConfig(sources=(source,), seq_len=96, block_samples=N, prefetch=0).build()
    kept = [stream.read_sample(0, 0, i) for i in range(N)]
    assert [len(s or ()) for s in kept] == [len(ORDERS[i % 4]) for i in range(N)]


def test_plain_folders_are_not_interleaved(tmp_path: Path) -> None:
    quiet(folder(tmp_path / "src"), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    assert not shards.interleaved and shards.each("image") == [(i, "image") for i in range(6)]
    assert list(shards[0].values) == ["text", "image", "audio"]
