"""The `data order` law, packing: it drops and mixes nothing, and text becomes no control id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stream_cases import CASES, N

from mm.batch import Batch
from mm.data.batching.collate import to_batch
from mm.data.batching.document import document_tokens
from mm.data.shards.reader import ShardSet
from mm.data.streams.packed import PackedConfig
from mm.errors import UserError
from mm.specs import Segment, TokenSpec
from mm.vocabulary import NULL, Vocabulary, extend_vocabulary


def read_back(
    b: Batch, vocabulary: Vocabulary
) -> Iterator[tuple[tuple[str, tuple[int, ...]], ...]]:
    """Documents of a batch, from ids alone: ((modality, codes), ...); ("null", ()) is null."""
    edges = [int(e) for e in b.layout.cu_seqlens]
    B, T = b.weight.shape
    ids, document = b.ids.flatten().tolist(), b.layout.fields.document.flatten()
    for m, start in enumerate(edges[:-1]):
        if start == B * T:
            break
        places = (document == m + 1).nonzero().flatten()
        assert places.tolist() == list(range(start, start + len(places))), (
            "documents are contiguous"
        )
        assert start // T == (start + len(places) - 1) // T, "and lie in one row"
        assert b.layout.fields.position.flatten()[places].tolist() == list(range(len(places)))
        stream, out, at = [ids[p] for p in places], [], 0
        while at < len(stream):
            if stream[at] == NULL:
                out.append(("null", ()))
                at += 1
                continue
            (name, r) = next(
                (n, r)
                for n in vocabulary.modalities
                if (r := vocabulary.range(n)).begin == stream[at]
            )
            stop = stream.index(r.end, at)
            out.append((name, tuple(i - r.first for i in stream[at + 1 : stop])))
            at = stop + 1
        yield tuple(out)


def test_packing_drops_and_mixes_nothing(data: Path) -> None:
    shards = ShardSet.open(data / "tokens")
    config = PackedConfig(
        sources=[{"path": data / "tokens"}],
        seq_len=64,
        batch_size=1,
        max_documents=5,
        block_samples=N,
    )
    stream = config.build(seed=0)
    expected = Counter(
        tuple((m, tuple(ids.tolist())) for m, ids in shards.tokens(i).items()) for i in range(N)
    )
    longest = max(sum(len(c) + 2 for _, c in d) for d in expected)
    assert longest <= 64, "the toys fit"
    found: Counter[Any] = Counter()
    keys: list[str] = []
    while stream.state_dict()["cursor"]["block/0"] == 0:
        (b,) = stream.next()
        found.update(read_back(b, stream.vocabulary))
        keys += b.keys
        assert b.layout.cu_seqlens.shape == (6,) and b.ids.shape == (1, 64, 1)
        assert stream.stats["padding_share"] == pytest.approx(
            float((b.layout.fields.document == 0).float().mean())
        )
    assert found == expected and sorted(keys) == [shards.key(i) for i in range(N)]
    stream.close()


def test_cut_documents_join_to_the_whole(data: Path) -> None:
    shards = ShardSet.open(data / "tokens")
    config = CASES["packed-cut"](data).model_copy(
        update={"block_samples": N, "batch_size": 1, "transform": ()}
    )
    stream = config.build(seed=0)
    pieces: dict[str, list[tuple[int, ...]]] = {}
    ends = 0
    while stream.state_dict()["cursor"]["block/0"] == 0:
        (b,) = stream.next()
        for key, document in zip(b.keys, read_back(b, stream.vocabulary), strict=True):
            pieces.setdefault(key, []).append(document[0][1])
        ends += int(((b.targets[..., 0] == stream.vocabulary.range("text").end) * b.weight).sum())
    assert ends == N, "only the real end of a text is a target"
    assert stream.stats["too_long"] == 0
    for i in range(N):
        whole = shards.tokens(i)["text"].tolist()
        parts = pieces[shards.key(i)]
        assert Counter(c for p in parts for c in p) == Counter(whole)
        assert all(
            any(tuple(whole[s : s + len(p)]) == p for s in range(0, len(whole), 10)) for p in parts
        )
    stream.close()


def test_long_documents_are_counted_and_a_hopeless_length_is_an_error(data: Path) -> None:
    config = PackedConfig(
        sources=[{"path": data / "tokens"}], seq_len=26, batch_size=2, block_samples=N
    )
    stream = config.build()
    shards = ShardSet.open(data / "tokens")
    lengths = sum(
        np.where(shards.lengths(m) >= 0, shards.lengths(m) + 2, 0)
        for m in ("text", "image", "audio")
    )
    stream.next()
    assert stream.stats["too_long"] == 2 * int((lengths > 26).sum()) > 0, "a block of each row"
    stream.close()
    with pytest.raises(UserError, match="gave no document .* raise data.seq_len"):
        config.model_copy(update={"seq_len": 4, "batch_size": 1}).build().next()


def test_shares_of_sources_hold_in_every_block(data: Path) -> None:
    sources = [
        {"path": data / "tokens", "weight": 3},
        {
            "path": data / "tokens",
            "weight": 1,
            "transform": [{"kind": "any_to_any", "tasks": {"image": 1}}],
        },
    ]
    stream = PackedConfig(sources=sources, seq_len=64, block_samples=40, prefetch=0).build()
    for number in range(4):
        block = stream.plan_block(number)
        taken = Counter(d.source for row in block.rows for d in row)
        assert taken[0] == 30 and taken[1] + block.filtered == 10


def test_every_sample_and_epoch_draws_anew(data: Path) -> None:
    tasks = {"image>text": 1, "text>image": 1}
    transform = {"kind": "any_to_any", "tasks": tasks, "condition_dropout": 0}
    source = {"path": data / "tokens", "transform": [transform]}
    stream = PackedConfig(sources=[source], seq_len=64, block_samples=N, prefetch=0).build(seed=0)
    drawn: list[dict[int, str]] = []
    for number in range(2):  # a block is an epoch here
        documents = [d for row in stream.plan_block(number).rows for d in row]
        made = [stream.read_sample(d.source, d.epoch, d.sample) for d in documents]
        drawn.append({d.sample: m[0].modality for d, m in zip(documents, made, strict=True)})
    assert len(drawn[0]) == 27 and 5 < sum(m == "image" for m in drawn[0].values()) < 22
    changed = sum(drawn[0][k] != drawn[1][k] for k in drawn[0])
    assert 5 < changed < 22, "the same sample meets another task in the next epoch"


def test_targets_weights_and_control_ids() -> None:
    vocabulary = extend_vocabulary([TokenSpec("text", 10), TokenSpec("image", 4, 2)])
    text, image = vocabulary.range("text"), vocabulary.range("image")
    null = Segment("image", None, role="condition")
    documents = [
        [
            Segment("image", np.array([7, 0]), role="condition"),
            Segment("text", np.array([1, 2]), weight=0.5),
        ],
        [null, Segment("text", np.array([], np.int32))],
    ]
    d = document_tokens(documents[0], vocabulary)
    stream = [
        image.begin,
        image.first + 7,
        image.first,
        image.end,
        text.begin,
        text.first + 1,
        text.first + 2,
        text.end,
    ]
    assert d.ids.tolist() == stream and d.targets.tolist() == stream[1:] + [-1]
    assert d.weights.tolist() == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0], (
        "codes and end of the target; never a begin"
    )
    assert d.modality.tolist() == [2] * 4 + [1] * 4
    b = to_batch([documents], vocabulary, 16, 4)
    assert b.ids[0, 8:12, 0].tolist() == [NULL, text.begin, text.end, -1]
    assert b.weight[0, 8:].tolist() == [0, 1] + [0] * 6
    assert b.places["tokens"].tolist() == [4, 5, 6, 9] and b.places["tokens"].dtype == torch.int32
    assert b.labels["target_modality"][0].tolist() == [
        2,
        2,
        2,
        1,
        1,
        1,
        1,
        0,
        1,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
    ]
    assert b.layout.fields.modality[0, 8:11].tolist() == [0, 1, 1]
    for bad in (
        Segment("text", np.array([10])),
        Segment("text", np.array([-1])),
        Segment("image", None),
    ):
        with pytest.raises(ValueError, match="segment"):
            document_tokens([bad], vocabulary)
    with pytest.raises(UserError, match="no modality 'smell'"):
        document_tokens([Segment("smell", np.array([1]))], vocabulary)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_never_becomes_a_control_id(tmp_path: Path, kind: str) -> None:
    from mm.data.pack.job import pack

    nasty = [
        "<|image|> <|pad|><|null|> <|document|>",
        "<|text|>",
        "[PAD]</s><unk><0x00>\0",
        "plain words",
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in nasty))
    if kind == "bytes":
        from mm.tokenizers.text.bytes import BytesConfig

        tokenizer = BytesConfig(modality="text").build()
    else:
        from mm.tokenizers.text.bpe import BpeConfig

        tokenizer = BpeConfig.smallest_tokenizer()
    pack(
        tmp_path / "rows.jsonl", tmp_path / "tokens", tokenizers={"text": tokenizer}, progress=False
    )
    shards = ShardSet.open(tmp_path / "tokens")
    r = shards.vocabulary.range("text")
    for i, text in enumerate(nasty):
        codes = shards.read_encoded(i)["text"]
        d = document_tokens([Segment("text", codes.ids)], shards.vocabulary)
        assert d.ids[0] == r.begin and d.ids[-1] == r.end
        assert ((d.ids[1:-1] >= r.first) & (d.ids[1:-1] < r.stop)).all(), (
            "only ordinary codes between them"
        )
        back = tokenizer.decode([codes])[0]
        assert (back.decode() if isinstance(back, bytes) else back) == text
