"""The `data order` law.

A resume goes on at any sample, world sizes partition the stream, packing drops and mixes nothing.

Runs over every kind of stream in the registry; `test_every_stream_has_a_case` asks for a new one's
line in `CASES`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import token_shards

from mm.batch import Batch
from mm.config import Config
from mm.data.batching.collate import document_tokens, to_batch
from mm.data.shards.reader import ShardSet
from mm.data.streams.bucketed import BucketedConfig
from mm.data.streams.packed import PackedConfig
from mm.data.streams.raw_items import ItemsConfig
from mm.data.streams.stateful import StatefulConfig
from mm.errors import UserError
from mm.registry import SOURCES, STREAMS, TRANSFORMS
from mm.specs import Segment, TokenSpec
from mm.vocabulary import NULL, Vocabulary, merged

N = 37
TASKS = {
    "kind": "any_to_any",
    "condition_dropout": 0.3,
    "tasks": {"image>text": 1, "text>image": 1, "audio>text": 1, "image+text>audio": 1, "text": 1},
}
DROP = {"kind": "any_to_any", "tasks": {"audio>text": 1, "text": 1}, "condition_dropout": 0.5}
CASES: dict[str, Callable[[Path], Config]] = {
    "packed": lambda d: PackedConfig(
        sources=[
            {"path": d / "tokens", "weight": 3},
            {"path": d / "tokens", "transform": [{"kind": "chunk", "tokens": 5}]},
        ],
        seq_len=48,
        batch_size=4,
        max_documents=4,
        block_samples=16,
    ),
    "packed-transform": lambda d: PackedConfig(
        sources=[{"path": d / "tokens"}],
        seq_len=64,
        batch_size=4,
        max_documents=6,
        block_samples=20,
        transform=[TASKS],
    ),
    "packed-cut": lambda d: PackedConfig(
        sources=[
            {"path": d / "tokens", "transform": [{"kind": "any_to_any", "tasks": {"text": 1}}]}
        ],
        seq_len=12,
        batch_size=4,
        max_documents=4,
        block_samples=8,
        cut=True,
    ),
    "packed-mixed": lambda d: PackedConfig(
        sources=[
            {"path": d / "tokens", "weight": {0: 1, 200: 4}},
            {"path": d / "tokens", "transform": [{"kind": "chunk", "tokens": 5}]},
        ],
        seq_len=48,
        batch_size=4,
        max_documents=4,
        block_samples=16,
        weights="tokens",
        shuffle="window",
        window_samples=8,
    ),
    "bucketed": lambda d: BucketedConfig(
        source={"path": d / "tokens"}, buckets=(2, 3), batch_size=4, tokens=800, transform=[DROP]
    ),
    "stateful": lambda d: StatefulConfig(
        source={"path": d / "tokens"}, seq_len=11, batch_size=4, max_documents=3, max_length=80
    ),
    "items": lambda d: ItemsConfig(
        path=d / "shards",
        batch_size=8,
        size=6,
        augment={"shift": 0.1, "rotate_deg": 9, "scale": 0.1, "flip": 0.5},
    ),
    "items-audio": lambda d: ItemsConfig(
        path=d / "shards",
        modality="audio",
        batch_size=8,
        sample_rate=8000,
        crop_seconds=0.03,
        loudness="rms",
        repeat="unique",
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards and token shards of 37 samples."""
    root = tmp_path_factory.mktemp("order")
    token_shards(root, N)
    return root


@pytest.fixture(params=list(CASES))
def config(request: pytest.FixtureRequest, data: Path) -> Config:
    return CASES[request.param](data)


def flat(b: Batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch by name."""
    out = {
        "ids": b.ids,
        "targets": b.targets,
        "weight": b.weight,
        "cu": b.layout.cu_seqlens,
        **b.layout.fields._asdict(),
        **b.labels,
    }
    out.pop("extra")
    out |= {f"place/{k}": v for k, v in b.places.items()}
    return out | {
        f"{k}/{f}": getattr(v, f) for k, v in b.values.items() for f in ("data", "length")
    }


def same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys == y.keys
        left, right = flat(x), flat(y)
        assert set(left) == set(right)
        for name in left:
            assert torch.equal(left[name], right[name]), name


def take(stream: Any, n: int) -> list[list[Batch]]:
    return [stream.next() for _ in range(n)]


def test_every_stream_has_a_case() -> None:
    assert set(STREAMS) <= {name.split("-")[0] for name in CASES}
    for registry in (STREAMS, TRANSFORMS, SOURCES):
        for kind in registry:
            smallest = registry.get(kind).smallest()
            assert registry.parse(smallest.to_dict()) == smallest


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_at_any_step_gives_the_same_stream(config: Any, prefetch: int) -> None:
    config = config.model_copy(update={"prefetch": prefetch})
    whole = config.build(seed=5)
    states, steps = [], []
    for _ in range(14):
        states.append(json.loads(json.dumps(whole.state_dict())))
        steps.append(whole.next())
    end = whole.state_dict()
    whole.close()
    after = whole.next()
    whole.close()
    for at in (0, 1, 6, 13):
        again = config.build(seed=5)
        again.next()  # a stream that has run may be moved
        again.load_state_dict(states[at])
        assert again.state_dict() == states[at]
        for expected in steps[at:]:
            same(again.next(), expected)
        assert again.state_dict() == end, "what was made ahead is not counted"
        again.close()
        same(again.next(), after)  # nor lost
        again.close()


def test_the_seed_is_what_the_order_depends_on(config: Any) -> None:
    first, same_seed, other = (config.build(seed=s).next() for s in (1, 1, 2))
    same(first, same_seed)
    assert first[0].keys != other[0].keys


@pytest.mark.parametrize("world", [2, 4])
def test_world_sizes_partition_the_global_batch(config: Any, world: int) -> None:
    one = config.build(seed=3)
    ranks = [config.build(seed=3, rank=r, world=world) for r in range(world)]
    for step in range(12):
        (whole,) = one.next()
        parts = [b for stream in ranks for b in stream.next()]
        assert whole.keys == tuple(k for p in parts for k in p.keys), (
            "no loss, no overlap, in order"
        )
        for name in ("ids", "targets", "weight"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
        for modality, value in whole.values.items():
            assert torch.equal(value.data, torch.cat([p.values[modality].data for p in parts])), (
                step
            )
        assert all(s.state_dict() == one.state_dict() for s in ranks)
        assert all(s.stats == one.stats for s in ranks)
    for stream in (one, *ranks):
        stream.close()


def test_resume_with_another_world_size(config: Any) -> None:
    one = config.build(seed=3)
    take(one, 5)
    ranks = [config.build(seed=3, rank=r, world=2) for r in range(2)]
    for stream in ranks:
        stream.load_state_dict(one.state_dict())
    (whole,) = one.next()
    assert whole.keys == tuple(k for s in ranks for b in s.next() for k in b.keys)
    for stream in (one, *ranks):
        stream.close()


def test_micro_batches_partition_the_rows_of_a_rank(config: Any) -> None:
    whole = config.build(seed=3)
    micro = config.model_copy(update={"micro_batch_size": 2}).build(seed=3)
    for _ in range(4):
        (a,), parts = whole.next(), micro.next()
        assert len(parts) == config.batch_size // 2
        assert a.keys == tuple(k for p in parts for k in p.keys)
        assert torch.equal(a.weight, torch.cat([p.weight for p in parts]))
    micro.load_state_dict(whole.state_dict())  # how rows are cut is no part of the order
    whole.close()
    micro.close()


def test_sizes_that_do_not_divide_are_errors(config: Any) -> None:
    with pytest.raises(
        UserError, match=r"data.batch_size \d does not divide over 3 processes; possible: \[1, 2, 4"
    ):
        config.build(world=3)
    with pytest.raises(UserError, match="data.micro_batch_size 3 does not divide"):
        config.model_copy(update={"micro_batch_size": 3}).build()


def test_another_plan_is_refused_by_name(config: Any) -> None:
    state = config.build(seed=1).state_dict()
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        config.build(seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="batch_size: . -> 16"):
        config.model_copy(update={"batch_size": 16}).build(seed=1).load_state_dict(state)


def test_items_come_once_an_epoch(data: Path) -> None:
    stream = ItemsConfig(path=data / "shards", batch_size=9, size=4).build(seed=0)
    assert len(stream) == 27
    for _ in range(3):
        keys = [k for (b,) in take(stream, 3) for k in b.keys]
        assert len(set(keys)) == len(keys) == 27
    stream.close()


# ---- packing


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
    while stream.state_dict()["cursor"]["block"] == 0:
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
    while stream.state_dict()["cursor"]["block"] == 0:
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
    assert stream.stats["too_long"] == int((lengths > 26).sum()) > 0
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
    assert stream.counts == [30, 10]
    for number in range(4):
        block = stream._block(number)
        documents = [d for row in block.rows for d in row.documents]
        assert len(documents) + block.filtered == 40
        assert (
            sum(len(d) == 1 and d[0].modality == "image" for d in documents) + block.filtered == 10
        )


def test_every_sample_and_epoch_draws_anew(data: Path) -> None:
    tasks = {"image>text": 1, "text>image": 1}
    transform = {"kind": "any_to_any", "tasks": tasks, "condition_dropout": 0}
    source = {"path": data / "tokens", "transform": [transform]}
    stream = PackedConfig(sources=[source], seq_len=64, block_samples=N, prefetch=0).build(seed=0)
    drawn: list[dict[str, str]] = []
    for number in range(2):  # a block is an epoch here
        rows = stream._block(number).rows
        keys = [k for row in rows for k in row.keys]
        firsts = [d[0].modality for row in rows for d in row.documents]
        drawn.append(dict(zip(keys, firsts, strict=True)))
    assert len(drawn[0]) == 27 and 5 < sum(m == "image" for m in drawn[0].values()) < 22
    changed = sum(drawn[0][k] != drawn[1][k] for k in drawn[0])
    assert 5 < changed < 22, "the same sample meets another task in the next epoch"


def test_targets_weights_and_control_ids() -> None:
    vocabulary = merged([TokenSpec("text", 10), TokenSpec("image", 4, 2)])
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
        codes = shards.encoded(i)["text"]
        d = document_tokens([Segment("text", codes.ids)], shards.vocabulary)
        assert d.ids[0] == r.begin and d.ids[-1] == r.end
        assert ((d.ids[1:-1] >= r.first) & (d.ids[1:-1] < r.stop)).all(), (
            "only ordinary codes between them"
        )
        back = tokenizer.decode([codes])[0]
        assert (back.decode() if isinstance(back, bytes) else back) == text
