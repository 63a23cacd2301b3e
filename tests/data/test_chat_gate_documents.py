"""The gate on documents with media: what is sound passes, what is moved by a token does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chat_toys import bpe, hf, jsonl, learnt, media_talk, talk
from data_toys import ToyTokenizer, png, wav

from mm.data.chat.gate import Gate
from mm.data.chat.loss import sample_segments
from mm.data.chat.template import ChatTemplate
from mm.data.pack.job import pack
from mm.data.shards.reader import ShardSet
from mm.specs import Segment

SHOWN = [{"type": "text", "text": "look"}, {"type": "image", "path": "a.png"}]
SHOWN_AND_SAID = [*SHOWN, {"type": "text", "text": "there"}]


def moved(segments: list[Segment], by: int) -> list[Segment]:
    """The loss of every text moved by some tokens."""
    out = []
    for s in segments:
        if s.modality == "text" and s.targets is not None:
            learnt = np.roll(s.targets[: len(s.ids)] >= 0, by)
            s = s._replace(targets=np.append(np.where(learnt, s.ids, -1), -1))
        out.append(s)
    return out


def unlearnt(s: Segment) -> Segment:
    return s._replace(targets=np.full(len(s.ids) + 1, -1, np.int32))


@pytest.mark.parametrize("name", ["own", "chatml", "parts", "brackets", "headers", "thinking"])
def test_sound_documents_pass_and_moved_ones_do_not(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.wav").write_bytes(wav(1))
    rows = [
        talk(0, turns=3),
        media_talk("a.png", "a.wav"),
        media_talk("a.png", "a.wav", SHOWN),
        media_talk("a.png", "a.wav", SHOWN_AND_SAID),
        media_talk("a.png", "a.wav", SHOWN[1:]),
    ]
    text = bpe() if name == "own" else hf(name)
    tools = {"text": text, "image": ToyTokenizer("image", 16), "audio": ToyTokenizer("audio", 32)}
    src = jsonl(tmp_path / "talks.jsonl", rows)
    report = pack(src, tmp_path / "out", tokenizers=tools, progress=False)
    shards, template = ShardSet.open(tmp_path / "out"), ChatTemplate.load(tmp_path / "out")
    assert report.samples == {"train": 5} and shards.vocabulary is not None and template is not None
    gate = Gate(template, text, shards.vocabulary)
    for i in range(5):
        segments = sample_segments(shards, i, shards.vocabulary)
        assert gate.fault(segments) == "", f"sample {i}"
        for by in (-2, -1, 1) if i < 4 else ():  # the last says one token
            assert gate.fault(moved(segments, by)), f"sample {i} moved by {by}"
        if i > 1:  # the assistant shows a picture
            silent = [unlearnt(s) if s.modality == "text" else s for s in segments]
            assert "of a turn: it would not stop" in gate.fault(silent)
            blind = [s._replace(role="condition") if s.modality == "image" else s for s in segments]
            assert gate.fault(blind)


@pytest.mark.parametrize("name", ["own", "chatml", "brackets"])
def test_calls_of_tools_are_learnt_and_what_tools_say_is_not(name: str, tmp_path: Path) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {}}}
    row = talk(2)
    row["messages"][1:1] = [
        {"role": "assistant", "content": "I add", "tool_calls": [call]},
        {"role": "tool", "content": "the sum is 2", "tool_call_id": "abcdefghi"},
    ]
    text = bpe() if name == "own" else hf(name)
    src = jsonl(tmp_path / "talks.jsonl", [row])
    pack(src, tmp_path / "out", tokenizers={"text": text}, progress=False)
    shards, template = ShardSet.open(tmp_path / "out"), ChatTemplate.load(tmp_path / "out")
    assert shards.vocabulary is not None and template is not None
    assert template.tool_header == ("[/TOOL]" if name == "brackets" else "")
    segments = sample_segments(shards, 0, shards.vocabulary)
    assert Gate(template, text, shards.vocabulary).fault(segments) == ""
    said = learnt(tmp_path / "out", text)
    assert len(said) == 2 and not any("sum" in run for run in said)
    assert ("add" in said[0]) and said[1].lstrip().startswith("it is 2.")


def test_all_is_learnt_where_a_pack_says_so_and_nowhere_else(tmp_path: Path) -> None:
    src = jsonl(tmp_path / "talks.jsonl", [talk(0, turns=2)])
    pack(src, tmp_path / "out", tokenizers={"text": bpe()}, loss="all", progress=False)
    shards, template = ShardSet.open(tmp_path / "out"), ChatTemplate.load(tmp_path / "out")
    assert shards.vocabulary is not None and template is not None
    segments = sample_segments(shards, 0, shards.vocabulary)
    assert Gate(template, bpe(), shards.vocabulary, every=True).fault(segments) == ""
    said = Gate(template, bpe(), shards.vocabulary).fault(segments)
    assert said == "all of its tokens are learnt, what the user says among them"
    assert shards.manifest["settings"]["chat"]["loss"] == "all"
