"""Token ids that another program made, with its tokenizer's fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_toys import toys
from test_hf import save
from tokenizers import Tokenizer, models, pre_tokenizers

from mm.data.pack.job import pack
from mm.data.pack.pretokenized import foreign_spec
from mm.data.pack.report import PackReport
from mm.data.shards.inspect import inspect
from mm.data.shards.manifest import read_manifest
from mm.data.shards.reader import QUARANTINE, ShardSet
from mm.data.shards.verify import verify
from mm.data.streams.packed import PackedConfig
from mm.errors import UserError
from mm.tokenizers.text.bpe import BpeConfig

WORDS = ["the", "cat", "sat", "on", "mat"]
TEXTS = [" ".join(WORDS[(i + k) % 5] for k in range(1 + i % 7)) for i in range(30)]


def quiet(src: Path, out: Path, **kw: Any) -> PackReport:
    return pack(src, out, progress=False, tokenized=True, **kw)


def third_party(file: Path, words: list[str] = WORDS) -> Tokenizer:
    """What `tokenizers` writes, with an added token as most models have."""
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="the"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|endoftext|>"])
    file.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(file))
    return made


def rows(tokenizer: Tokenizer, column: str = "input_ids") -> list[dict[str, Any]]:
    return [{column: tokenizer.encode(t).ids + [5], "label": i} for i, t in enumerate(TEXTS)]


def jsonl(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_ids_and_fingerprint_arrive(tmp_path: Path, kind: str) -> None:
    made = rows(third_party(tmp_path / "tokenizer.json"))
    src = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        jsonl(src, made)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), src)
    else:
        save(src, made, "train")
        made = made[::2] + made[1::2]  # file after file
    report = quiet(src, tmp_path / "out")
    assert report.kind == "tokens" and report.samples == {"train": 30} and not report.quarantined
    shards = ShardSet.open(tmp_path / "out")
    mark = foreign_spec(tmp_path / "tokenizer.json", "text")
    assert shards.specs == (mark,) and mark.vocab_size == 6
    for i in range(30):
        assert shards.tokens(i)["text"].tolist() == made[i]["input_ids"]
        assert shards.meta(i) == {"label": made[i]["label"]}
    assert verify(tmp_path / "out")["ok"]
    ranges = inspect(tmp_path / "out")["vocabulary"]["ranges"]
    assert ranges["text"]["fingerprint"] == mark.fingerprint
    assert quiet(src, tmp_path / "out").already
    stream = PackedConfig(sources=({"path": tmp_path / "out"},), seq_len=32, prefetch=0).build()
    (b,) = stream.next()
    assert 0 < float(b.weight.sum()) and int(b.ids.max()) < shards.vocabulary.size  # type: ignore[union-attr]


def test_bad_ids_are_quarantined(tmp_path: Path) -> None:
    tokenizer = third_party(tmp_path / "tokenizer.json")
    bad: list[Any] = [[6], [-1], [2**40], "the cat", [0.5], [True], [[1]], None, []]
    made = [*rows(tokenizer), *({"key": f"bad{n}", "input_ids": v} for n, v in enumerate(bad))]
    report = quiet(jsonl(tmp_path / "a.jsonl", made), tmp_path / "out", max_bad=0.5)
    lines = (tmp_path / "out" / QUARANTINE).read_text().splitlines()
    said = {row["key"]: row["reason"] for row in map(json.loads, lines)}
    assert report.samples == {"train": 31}, "no ids at all are an empty text"
    assert set(said) == {f"bad{n}" for n in range(8)}
    assert said["bad0"] == "text: id 6 outside 0..5" and "-1..-1 are no" in said["bad1"]
    assert said["bad3"] == "text: expected a list of token ids, found 'the cat'"
    assert "no value in input_ids" in said["bad7"]


def test_another_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    """Two data sets of one run, and a run's own vocabulary."""
    for name, words in (("a", WORDS), ("b", WORDS[::-1])):
        tokenizer = third_party(tmp_path / name / "tokenizer.json", words)
        quiet(jsonl(tmp_path / name / "rows.jsonl", rows(tokenizer)), tmp_path / f"{name}.out")
    marks = [foreign_spec(tmp_path / n / "tokenizer.json", "text").fingerprint[:12] for n in "ab"]
    sources = tuple({"path": tmp_path / f"{n}.out"} for n in "ab")
    said = f"b.out: modality 'text' was tokenised by {marks[1]}, this vocabulary has {marks[0]}"
    with pytest.raises(UserError, match=said) as error:
        PackedConfig(sources=sources).build()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"taken by tokenizer {marks[0]}, not {marks[1]}"):
        quiet(
            tmp_path / "b" / "rows.jsonl",
            tmp_path / "c.out",
            vocabulary=tmp_path / "a.out" / "vocabulary.json",
        )
    own = ShardSet.open(tmp_path / "a.out").vocabulary
    with pytest.raises(UserError, match=f"tokenised by {marks[1]}, this vocabulary has"):
        PackedConfig(sources=sources[1:]).build(vocabulary=own)


def test_the_fingerprint_is_that_of_what_makes_ids(tmp_path: Path) -> None:
    tokenizer = third_party(tmp_path / "a.json")
    first = foreign_spec(tmp_path / "a.json", "text")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "b.json"), pretty=False)
    assert foreign_spec(tmp_path / "b.json", "text") == first
    tokenizer.add_special_tokens(["<|pad|>"])
    tokenizer.save(str(tmp_path / "c.json"))
    other = foreign_spec(tmp_path / "c.json", "text")
    assert other.fingerprint != first.fingerprint and other.vocab_size == 7
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(UserError, match=r"d\.json: not a tokenizer\.json"):
        foreign_spec(tmp_path / "d.json", "text")


def test_several_modalities_and_our_own_tokenizers(tmp_path: Path) -> None:
    """Ids of an own tokenizer are the same shards that packing the texts gives."""
    bpe = BpeConfig(vocab_size=280).fit(TEXTS)
    bpe.save(tmp_path / "tokenizers" / "text")
    third_party(tmp_path / "tokenizers" / "sounds" / "tokenizer.json")
    ids = [code.ids.tolist() for code in bpe.encode(TEXTS)]
    made = [{"key": f"k{i}", "a": v, "b": v[:2][::-1]} for i, v in enumerate(ids)]
    for row in made:
        row["b"] = [n % 6 for n in row["b"]]
    jsonl(tmp_path / "ids.jsonl", made)
    columns = {"text": "a", "sounds": "b"}
    quiet(
        tmp_path / "ids.jsonl",
        tmp_path / "two",
        columns=columns,
        tokenizers=tmp_path / "tokenizers",
    )
    two = ShardSet.open(tmp_path / "two")
    assert two.modalities == ("text", "sounds") and two.tokens(3)["sounds"].tolist() == made[3]["b"]
    texts = [{"key": f"k{i}", "text": t} for i, t in enumerate(TEXTS)]
    jsonl(tmp_path / "texts.jsonl", texts)
    own = {"text": tmp_path / "tokenizers" / "text"}
    quiet(tmp_path / "ids.jsonl", tmp_path / "one", columns={"text": "a"}, tokenizers=own)
    pack(tmp_path / "texts.jsonl", tmp_path / "texts", tokenizers=own, progress=False)
    a, b = (read_manifest(tmp_path / n) for n in ("one", "texts"))
    assert a["splits"] != b["splits"], "the ids' table has a column more, as metadata"
    assert a["vocabulary"] == b["vocabulary"]
    one, other = ShardSet.open(tmp_path / "one"), ShardSet.open(tmp_path / "texts")
    assert all(np.array_equal(one.tokens(i)["text"], other.tokens(i)["text"]) for i in range(30))


def test_segments_of_ids(tmp_path: Path) -> None:
    segments = [{"text": [1, 2]}, {"image": [3]}, {"text": [4]}]
    path = jsonl(tmp_path / "a.jsonl", [{"segments": segments}])
    given = {m: t for m, t in toys().items() if m != "audio"}
    quiet(path, tmp_path / "out", columns={"segments": "segments"}, tokenizers=given)
    found = ShardSet.open(tmp_path / "out").tokens(0)
    assert {k: v.tolist() for k, v in found.items()} == {
        "000.text": [1, 2], "001.image": [3], "002.text": [4],
    }  # fmt: skip


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"input_ids": [1]}])
    with pytest.raises(UserError, match="no tokenizer.json beside it; say which .* --tokenizers"):
        quiet(path, tmp_path / "out")
    third_party(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no column 'x' for modality 'text'"):
        quiet(path, tmp_path / "out", columns={"text": "x"})
    jsonl(path, [{"other": [1]}])
    with pytest.raises(UserError, match="no column called text, input_ids, token_ids, tokens, ids"):
        quiet(path, tmp_path / "out")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("a")
    with pytest.raises(UserError, match="--tokenized means nothing for a source of kind 'folder'"):
        quiet(tmp_path / "files", tmp_path / "out")
