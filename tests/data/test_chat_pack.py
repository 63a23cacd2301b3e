"""Conversations of every shape become token shards that say what of them is learnt."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_toys import bpe, hf, jsonl, learnt, talk
from data_toys import ToyTokenizer, png, wav

from mm.data.batching.document import document_tokens
from mm.data.chat.loss import LOSS, learn, sample_segments
from mm.data.chat.show import inspect_loss
from mm.data.chat.template import ChatTemplate, template_of
from mm.data.pack.config import PackConfig
from mm.data.pack.job import PackJob, pack
from mm.data.pack.preview import preview
from mm.data.pack.report import PackReport
from mm.data.shards.reader import QUARANTINE, ShardSet
from mm.data.shards.verify import verify
from mm.data.streams.packed import PackedConfig
from mm.errors import UserError
from mm.specs import Segment

WANTED = [["it is 0.■"], ["it is 1.■"], ["it is 2.■"], ["it is 3.■"]]


def quiet(src: Path, out: Path, **kw: Any) -> PackReport:
    return pack(src, out, progress=False, **({"tokenizers": {"text": bpe()}} | kw))


def shape(name: str, i: int) -> dict[str, Any]:
    asked, said = f"what is {i} + 0?", f"it is {i}."
    return {
        "openai": talk(i),
        "openai as json": {"messages": json.dumps(talk(i)["messages"])},
        "parts": {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": asked}]},
                {"role": "assistant", "content": [{"type": "text", "text": said}]},
            ]
        },
        "sharegpt": {
            "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        },
        "alpaca": {"instruction": "what is", "input": f"{i} + 0?", "output": said},
        "pair": {"question": asked, "answer": said, "text": None},
    }[name]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        jsonl(path, rows)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


CASES = [
    ("openai", ".jsonl"), ("openai", ".json"), ("openai", ".parquet"), ("parts", ".jsonl"),
    ("openai as json", ".csv"), ("sharegpt", ".json"), ("sharegpt", ".parquet"),
    ("alpaca", ".json"), ("alpaca", ".csv"), ("alpaca", ".parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_every_shape_in_every_table_is_read_alike(tmp_path: Path, name: str, suffix: str) -> None:
    src = write(tmp_path / f"talks{suffix}", [shape(name, i) for i in range(4)])
    report = quiet(src, tmp_path / "out")
    assert report.samples == {"train": 4} and report.quarantined == 0
    assert [learnt(tmp_path / "out", bpe(), i) for i in range(4)] == WANTED
    assert verify(tmp_path / "out")["ok"]


def test_a_saved_data_set_keeps_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = {s: datasets.Dataset.from_list([talk(i) for i in range(2)]) for s in ("train", "test")}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "hub")
    # Every talk is in both: the second would be a duplicate, were it not for its split
    report = quiet(tmp_path / "hub", tmp_path / "out")
    assert report.samples == {"train": 2} and report.duplicates == 2
    assert learnt(tmp_path / "out", bpe(), 1) == ["it is 1.■"]


def test_the_map_is_guessed_and_overridden(tmp_path: Path) -> None:
    rows = [
        {"frage": f"what is {i} + 0?", "antwort": f"it is {i}.", "quelle": "x"} for i in range(4)
    ]
    src = jsonl(tmp_path / "talks.jsonl", rows)
    columns = {"user": "frage", "assistant": "antwort"}
    job = PackJob(
        PackConfig(src=src, out=tmp_path / "out", tokenizers={"text": bpe()}, map=columns)
    )
    shown = preview(job)
    assert [key for key, _ in shown] == ["talks-00000000", "talks-00000001", "talks-00000002"]
    asked = "### User\nwhat is 1 + 0?\n\n### Assistant\n"
    assert shown[1][1] == [(asked, False), ("it is 1.■", True)]
    job.run(progress=False)
    assert [learnt(tmp_path / "out", bpe(), i) for i in range(4)] == WANTED
    found = inspect_loss(tmp_path / "out", {"text": bpe()}, sample=1)
    assert [f["runs"] for f in found[:2]] == [shown[1][1], shown[2][1]]


MAPS = {
    "an unknown name": ({"messages": "messages", "imag": "x"}, "--map imag=x: unknown; did you"),
    "an unknown column": ({"messages": "talk"}, "no column 'talk'; columns: messages, n"),
    "half a pair": ({"user": "n"}, "give messages=COLUMN, or user=COLUMN and assistant=COLUMN"),
    "both shapes": ({"messages": "messages", "user": "n"}, "holds whole conversations"),
}


@pytest.mark.parametrize("case", MAPS)
def test_a_map_is_refused_with(case: str, tmp_path: Path) -> None:
    src = jsonl(tmp_path / "talks.jsonl", [talk(i, n=i) for i in range(3)])
    given, why = MAPS[case]
    with pytest.raises(UserError, match=why):
        quiet(src, tmp_path / "out", map=given)
    assert not (tmp_path / "out").exists()


def test_loss_is_on_the_assistant_and_what_stops_it_alone(tmp_path: Path) -> None:
    src = jsonl(tmp_path / "talks.jsonl", [talk(i, turns=2) for i in range(3)])
    quiet(src, tmp_path / "own")
    assert learnt(tmp_path / "own", bpe()) == ["it is 0.■", "it is 1.■"]
    quiet(src, tmp_path / "chatml", tokenizers={"text": hf("chatml")})
    assert learnt(tmp_path / "chatml", hf("chatml")) == [
        "it is 0.<|im_end|>",
        "it is 1.<|im_end|>",
    ]
    quiet(src, tmp_path / "all", loss="all")
    assert "".join(learnt(tmp_path / "all", bpe())).startswith("### User\nwhat is 0 + 0?")


def test_spans_become_targets_and_weights() -> None:
    ids = np.array([3, 4, 5], np.int32)
    plain = Segment("text", ids)
    assert learn(plain, {}) is plain
    assert learn(plain, {LOSS: []}).role == "condition"
    cut = learn(plain, {LOSS: [[1, 3]]})
    assert cut.targets.tolist() == [-1, 4, 5, -1], "the end is not learnt"
    ended = learn(plain, {LOSS: [[2, 4]]})
    assert ended.targets.tolist() == [-1, -1, 5]


def test_packed_rows_carry_the_loss_and_a_resume_is_exact(tmp_path: Path) -> None:
    src = jsonl(tmp_path / "talks.jsonl", [talk(i, turns=1 + i % 3) for i in range(20)])
    quiet(src, tmp_path / "out")
    config = PackedConfig(sources=({"path": tmp_path / "out"},), seq_len=160, batch_size=2)
    stream = config.build(seed=3)
    (batch,) = stream.next()
    state = stream.state_dict()
    after = stream.next()[0]
    again = config.build(seed=3)
    again.load_state_dict(state)
    again.load_state_dict(state)
    twin = again.next()[0]
    for name in ("ids", "targets", "weight"):
        assert (getattr(twin, name) == getattr(after, name)).all()
    # A token has the weight that it has alone: documents do not touch each other.
    shards = ShardSet.open(tmp_path / "out")
    words = shards.vocabulary
    assert words is not None
    alone = {}
    for i in range(len(shards)):
        document = document_tokens(sample_segments(shards, i, words), words)
        alone[shards.key(i)] = (document.ids.tolist(), document.weights.tolist())
    row_ids, row_weight = batch.ids[..., 0].tolist(), batch.weight.tolist()
    document = batch.layout.fields.document.tolist()
    keys = iter(batch.keys)
    for ids, weight, own in zip(row_ids, row_weight, document, strict=True):
        for number in sorted({d for d in own if d}):
            at = [t for t, d in enumerate(own) if d == number]
            wanted = alone[next(keys)]
            assert [ids[t] for t in at] == wanted[0]
            assert [weight[t] for t in at] == pytest.approx(wanted[1])
    stream.close()
    again.close()


def media_talk(image: Any, audio: Any, answer: Any = "it is red.") -> dict[str, Any]:
    asked = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": image},
        {"type": "text", "text": "and hear"},
        {"type": "input_audio", "input_audio": audio},
    ]
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    }


@pytest.mark.parametrize("name", ["own", "chatml", "parts"])
def test_media_are_segments_between_the_texts(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.wav").write_bytes(wav(1))
    inline = {"url": "data:image/png;base64," + base64.b64encode(png(1)).decode()}
    sound = {"data": base64.b64encode(wav(1)).decode(), "format": "wav"}
    rows = [
        media_talk({"url": "a.png"}, "a.wav"),
        media_talk(inline, sound, "it is blue."),
        media_talk("a.png", "a.wav", [{"type": "image", "path": "a.png"}]),
    ]
    text = bpe() if name == "own" else hf(name)
    tools = {"text": text, "image": ToyTokenizer("image", 16), "audio": ToyTokenizer("audio", 32)}
    report = quiet(jsonl(tmp_path / "talks.jsonl", rows), tmp_path / "out", tokenizers=tools)
    assert report.samples == {"train": 3}, report.rejected
    shards = ShardSet.open(tmp_path / "out")
    words = shards.vocabulary
    assert words is not None
    kinds = ["text", "image", "text", "audio", "text"]
    for i, wanted in enumerate((kinds, kinds, [*kinds, "image", "text"])):
        segments = sample_segments(shards, i, words)
        assert [s.modality for s in segments] == wanted
        roles = [s.role for s in segments if s.modality in ("image", "audio")]
        assert roles == ["condition", "condition", *["target"] * (i == 2)]
    one, two = (sample_segments(shards, i, words)[1].ids for i in (0, 1))
    assert (one == two).all() and len(one)
    stop = "■" if name == "own" else "<|im_end|>"
    assert learnt(tmp_path / "out", text)[-1] == f"it is red.{stop}"


def test_a_column_of_media_goes_where_the_text_says(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    say = lambda asked: [{"from": "human", "value": asked}, {"from": "gpt", "value": "red"}]
    rows = [
        {"id": "one", "image": "a.png", "conversations": say("<image>\nwhat colour?")},
        {"id": "two", "image": ["a.png", "b.png"], "conversations": say("<image> or <image>?")},
        {"id": "first", "image": "b.png", "conversations": say("what colour?")},
        {"id": "none", "image": None, "conversations": say("hm?")},
        {"id": "many", "image": "a.png", "conversations": say("<image> or <image>?")},
    ]
    tools = {"text": bpe(), "image": ToyTokenizer("image", 16)}
    src = jsonl(tmp_path / "talks.jsonl", rows)
    report = quiet(src, tmp_path / "out", tokenizers=tools, max_bad=0.5)
    shards = ShardSet.open(tmp_path / "out")
    assert report.examples == {
        "image: * of them for * places <image>": "image: 1 of them for 2 places <image> "
        "(talks.jsonl:5)"
    }
    found = {shards.key(i): [m.split(".")[-1] for m in shards.tokens(i)] for i in range(4)}
    assert found == {
        "one": ["text", "image", "text"],
        "two": ["text", "image", "text", "image", "text"],
        "first": ["text", "image", "text"],
        "none": ["text"],
    }


def test_left_out_samples_are_counted_by_reason(tmp_path: Path) -> None:
    empty = talk(9)
    empty["messages"][1]["content"] = "  "
    rows = [talk(0), talk(1), talk(0), empty, {"messages": []}, talk(7, turns=30)]
    report = quiet(jsonl(tmp_path / "talks.jsonl", rows), tmp_path / "out", max_tokens=200)
    assert report.samples == {"train": 2} and report.quarantined == 0
    assert report.skipped == {"empty": 2, "too long": 1} and report.duplicates == 1
    lines = [json.loads(x) for x in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [x["source"] for x in lines] == ["talks.jsonl:4", "talks.jsonl:5", "talks.jsonl:6"]
    assert "more than --max-tokens 200" in lines[2]["reason"]
    with pytest.raises(UserError, match="nothing to pack; left out: 1 x too long"):
        quiet(jsonl(tmp_path / "long.jsonl", rows[-1:]), tmp_path / "none", max_tokens=20)
    assert not (tmp_path / "none").exists()


BAD = {
    "a missing file": (
        media_talk("gone.png", "a.wav"),
        "'gone.png': no such file",
    ),
    "a file elsewhere": (media_talk("../x.png", "a.wav"), "leads out of"),
    "a web address": (
        media_talk({"url": "https://example.com/a.png"}, "a.wav"),
        "is not fetched: give a file beside the table",
    ),
    "no base64": (media_talk({"url": "data:image/png;base64,%%"}, "a.wav"), "no base64"),
    "an unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "smell", "smell": "a"}]}]},
        "message 0, part 0: unknown type 'smell'",
    ),
    "an unknown role": (
        {"messages": [{"role": "asistant", "content": "x"}]},
        "message 0: unknown role 'asistant'; did you mean 'assistant'",
    ),
    "a bad line": ('{"messages": [', "json: "),
    "a number for a text": ({"messages": [{"role": "user", "content": 3}]}, "neither text nor a"),
    "a bare list": ({"messages": ["hello"]}, "expected a role and a content"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    row, why = BAD[case]
    (tmp_path / "a.wav").write_bytes(wav(1))
    tools = {"text": bpe(), "image": ToyTokenizer("image", 16), "audio": ToyTokenizer("audio", 32)}
    src = jsonl(tmp_path / "talks.jsonl", [talk(0), row, talk(1)])
    report = quiet(src, tmp_path / "out", tokenizers=tools)
    (said,) = report.examples.values()
    assert why in said and said.endswith("(talks.jsonl:2)"), said
    assert report.samples == {"train": 2} and report.quarantined == 1
    # More of them than allowed stop the pack in one line, and leave nothing but their list.
    src = jsonl(tmp_path / "more.jsonl", [talk(0), row, row])
    with pytest.raises(UserError, match="2 of 3 samples are unreadable") as caught:
        quiet(src, tmp_path / "none", tokenizers=tools)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "none").exists()
    assert [p.name for p in tmp_path.glob("none*")] == [f"none.{QUARANTINE}"]


def test_a_template_that_fails_later_stops_the_pack_and_names_the_sample(tmp_path: Path) -> None:
    late = "{% if messages | length > 3 %}{{ 'a' * (10 ** 12) }}{% endif %}"
    file = tmp_path / "late.jinja"
    file.write_text(
        hf("chatml").beside["chat_template.jinja"].decode() + late.replace("> 3", "> 5")
    )
    src = jsonl(tmp_path / "talks.jsonl", [talk(0), talk(1, turns=4)])
    with pytest.raises(UserError, match=r"talks-00000001.*talks\.jsonl:2.*late\.jinja: .*memory"):
        quiet(src, tmp_path / "out", tokenizers={"text": hf("chatml")}, template=file)
    assert not (tmp_path / "out").exists()


def test_roles_that_a_template_refuses_are_reasons(tmp_path: Path) -> None:
    row = talk(1)
    row["messages"].insert(0, {"role": "system", "content": "be kind"})
    src = jsonl(tmp_path / "talks.jsonl", [talk(0), row])
    report = quiet(src, tmp_path / "out", tokenizers={"text": hf("brackets")})
    assert list(report.rejected) == ["the template refuses it: only user and assistant"]
    assert report.samples == {"train": 1}
    assert ChatTemplate.load(tmp_path / "out") == template_of(hf("brackets"))


def test_conversations_without_tokenizers_and_their_options_elsewhere_are_refused(
    tmp_path: Path,
) -> None:
    src = jsonl(tmp_path / "talks.jsonl", [talk(0)])
    with pytest.raises(UserError, match="add --tokenizers DIR"):
        quiet(src, tmp_path / "out", tokenizers=None)
    plain = jsonl(tmp_path / "plain.jsonl", [{"text": "a"}])
    for given in ({"max_tokens": 9}, {"loss": "all"}, {"template": Path("default")}):
        (name,) = given
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is of conversations"):
            quiet(plain, tmp_path / "out", **given)


def test_what_was_packed_before_is_told_from_what_another_template_makes(tmp_path: Path) -> None:
    src = jsonl(tmp_path / "talks.jsonl", [talk(i) for i in range(2)])
    tools = {"text": hf("chatml")}
    quiet(src, tmp_path / "out", tokenizers=tools)
    assert quiet(src, tmp_path / "out", tokenizers=tools).already
    with pytest.raises(UserError, match="packed from another source or with other settings"):
        quiet(src, tmp_path / "out", tokenizers=tools, template=Path("default"))


def test_tables_with_columns_of_modalities_are_read_as_before(tmp_path: Path) -> None:
    """A column called `text` beside a question is what it was; turns of a conversation win."""
    rows = [{"text": "a", "question": "b", "answer": "c"}]
    report = quiet(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a", tokenizers=None)
    assert report.kind == "raw" and not ShardSet.open(tmp_path / "a").says_loss
    quiet(jsonl(tmp_path / "b.jsonl", [{"text": "a", **talk(0)}]), tmp_path / "b")
    assert ShardSet.open(tmp_path / "b").says_loss
