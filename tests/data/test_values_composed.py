"""Values in every role through every stream, as users compose them: room, parts, fields, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import wav
from PIL import Image
from test_values import SHAPES, tokenizers
from torch import Tensor

from mm.batch import Batch
from mm.data.batching.borders import document_length, part_lengths
from mm.data.batching.collate import Declared, to_batch
from mm.data.batching.document import document_tokens
from mm.data.pack.job import pack
from mm.data.shards.reader import ShardSet
from mm.data.streams.base import merge_states
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.registry import NETWORKS, STREAMS, TRANSFORMS
from mm.specs import Segment, Transform

TASKS = {"image>text": 1.0, "audio>text": 1.0, "text>image": 1.0, "text>audio": 1.0}
ASK = {"kind": "any_to_any", "tasks": TASKS, "condition_dropout": 0.2}
READ = {**ASK, "tasks": {"image>text": 1.0, "audio>text": 1.0}}
# Each as a user would write it under data.transform
RECIPES: dict[str, list[dict[str, Any]]] = {
    "values are predicted": [ASK],
    "room": [{"kind": "room", "modality": "image", "places": 5}, READ],
    "room shared": [{"kind": "room", "modality": "audio", "every": 2}, READ],
    "parts": [READ, {"kind": "to_part", "part": "source"}],
    "labels": [{**READ, "condition_dropout": 0.0}, {"kind": "to_label"}],
    "fields": [ASK, {"kind": "mark"}, {"kind": "mark", "field": "span", "modalities": ["image"]}],
    "all": [
        {"kind": "chunk", "modality": "audio", "tokens": 5},
        {"kind": "room", "modality": "image", "places": 3},
        {**READ, "condition_dropout": 0.0},
        {"kind": "mark"},
        {"kind": "to_part", "part": "source", "modalities": ["image"]},
        {"kind": "to_label", "modalities": ["text"], "keep": True},
    ],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("composed") / "source"
    source.mkdir()
    for i in range(15):
        if i % 3:
            pixels = np.random.default_rng(i).integers(0, 256, (*SHAPES[i % 4], 3), np.uint8)
            Image.fromarray(pixels).save(source / f"{i:02d}.png")
        else:
            (source / f"{i:02d}.wav").write_bytes(wav(i, 400 + 160 * i))
        (source / f"{i:02d}.txt").write_text(f"{i} " * (1 + i % 4))
    out = source.parent / "tokens"
    pack(source, out, tokenizers=tokenizers(), progress=False)
    return out


def stream(root: Path, kind: str, transform: Any, rank: int = 0, world: int = 1) -> Any:
    sizes: dict[str, Any] = {
        "packed": {"seq_len": 96, "max_documents": 4, "part_len": 40},
        "bucketed": {"buckets": 3},
        "stateful": {"seq_len": 24, "max_documents": 4, "max_length": 96},
    }[kind]
    given = {"kind": kind, "batch_size": 2, "prefetch": 0, "transform": transform, **sizes}
    source = {"path": str(root)}
    given |= {"sources": [source]} if kind == "packed" else {"source": source}
    return STREAMS.parse(given).build(rank=rank, world=world)


def tensors(b: Batch) -> dict[str, Tensor]:
    """Everything in a batch by name."""
    out = {"ids": b.ids, "targets": b.targets, "weight": b.weight}
    out["position"], out["document"] = b.layout.fields.position, b.layout.fields.document
    out |= {f"extra.{k}": v for k, v in b.layout.fields.extra.items()}
    out |= {f"places.{k}": v for k, v in b.places.items()}
    out |= {f"head_targets.{k}": v for k, v in b.head_targets.items()}
    out |= {f"labels.{k}": v for k, v in b.labels.items()}
    for name, v in b.values.items():
        out |= {f"values.{name}.{k}": getattr(v, k) for k in ("data", "length", "place", "room")}
    for name, part in b.parts.items():
        out |= {f"parts.{name}.{k}": v for k, v in tensors(part).items()}
    return out


def assert_same(a: Batch, b: Batch) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys() and a.keys == b.keys
    for name, t in one.items():
        assert torch.equal(t, other[name]), name


CASES = [(k, r) for k in ("packed", "bucketed", "stateful") for r in RECIPES]
REFUSED = {
    ("stateful", "labels"): "labels whole documents",
    ("stateful", "all"): "labels whole documents",
    ("stateful", "room"): "which a window cuts",
    ("stateful", "room shared"): "which a window cuts",
    ("bucketed", "room"): "its bucket has",  # more places than values
}


@pytest.mark.parametrize("kind,recipe", [c for c in CASES if c not in REFUSED])
def test_every_stream_carries_it_and_resumes(root: Path, kind: str, recipe: str) -> None:
    transform = RECIPES[recipe]
    one, seen, state = stream(root, kind, transform), [], None
    for step in range(8):
        if step == 4:
            state = one.state_dict()
        seen += one.next()
    for b in seen:
        assert set(b.parts) == set(one.declared.parts)
        assert set(b.places) == {"tokens", *one.declared.values, *one.declared.labels}
        assert set(b.layout.fields.extra) == {"prefix", *one.declared.fields}
        for name, target in b.head_targets.items():
            assert len(target) == len(b.places[name])
        for part in b.parts.values():  # the same documents, in the same order
            mine, its = b.layout.fields.document, part.layout.fields.document
            assert set(its.unique().tolist()) <= set(mine.unique().tolist()) | {0}
            assert part.layout.cu_seqlens.shape == b.layout.cu_seqlens.shape
        _check_values(b)
        _check_targets(b, one.vocabulary)
    again = stream(root, kind, transform)
    assert state is not None
    again.load_state_dict(state)
    for b in seen[4:]:
        (other,) = again.next()
        assert_same(b, other)
    rows = [stream(root, kind, transform, rank, 2) for rank in range(2)]
    for b in seen[:4]:
        halves = [tensors(each.next()[0]) for each in rows]
        if kind != "bucketed":  # a row is the same whatever process reads it
            assert torch.equal(torch.cat([h["ids"] for h in halves]), b.ids)
    merged = merge_states([each.state_dict() for each in rows])
    again.load_state_dict(merged)
    (other,) = again.next()
    assert_same(other, seen[4])


def _check_values(b: Batch) -> None:
    for part in (b, *b.parts.values()):
        for values in part.values.values():
            for first, room in zip(values.place.tolist(), values.room.tolist(), strict=True):
                assert (part.ids.flatten()[first : first + room] == -1).all()
            assert values.is_full == bool((values.length == values.room).all()) or values.is_full
            assert not values.is_full or bool((values.length == values.room).all())


def _check_targets(b: Batch, vocabulary: Any) -> None:
    """A place that predicts values stands before them; every other prediction is an id."""
    ids, weight = b.ids.flatten(), b.weight.flatten()
    tokens = b.places["tokens"].long()
    assert (b.targets.flatten()[tokens] >= 0).all()
    others = [b.places[m].long() for m in b.head_targets if vocabulary.spec(m).continuous]
    mine = torch.cat([tokens, *others]).sort().values
    assert torch.equal(mine, weight.nonzero().flatten())
    for m, values in b.values.items():
        if m not in b.head_targets:
            continue
        goal = dict(zip(b.places[m].tolist(), b.head_targets[m], strict=True))
        for i, (first, n) in enumerate(
            zip(values.place.tolist(), values.length.tolist(), strict=True)
        ):
            for k in range(n):
                if first + k - 1 in goal and ids[first + k - 1] != -2:
                    assert torch.equal(goal[first + k - 1], values.data[i, k])


@pytest.mark.parametrize("kind,recipe", sorted(REFUSED))
def test_what_a_stream_cannot_carry_is_refused(root: Path, kind: str, recipe: str) -> None:
    with pytest.raises(UserError, match=REFUSED[kind, recipe]):
        made = stream(root, kind, RECIPES[recipe])
        for _ in range(8):
            made.next()


MODEL: dict[str, Any] = {
    "kind": "lm",
    "d_model": 16,
    "adapters": {
        "image": {"kind": "patches", "patch": 4, "width": 4},
        "audio": {"kind": "mel", "n_mels": 8, "stack": 2, "width": 4},
    },
    "backbone": {"kind": "stack", "depth": 2, "pattern": "attention"},
}


@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("recipe", ["room", "room shared", "parts", "fields", "all"])
def test_packed_equals_alone(root: Path, recipe: str, mask: str) -> None:
    """Hidden states of each document and its second sequence, whatever it shares a row with."""
    made = stream(root, "packed", RECIPES[recipe])
    (batch,) = made.next()
    module: Any = NETWORKS.parse({**MODEL, "mask": mask}).build(made.vocabulary).double()
    torch.manual_seed(0)
    init_weights(module)
    block = made._block(0, 0)
    documents = [made.read_sample(d.source, d.epoch, d.sample) for d in block.rows[0]]
    declared = made.declared
    together = to_batch([documents], made.vocabulary, declared=declared)
    memory: dict[str, Any] = {}
    module.backbone.register_forward_pre_hook(lambda _, given: memory.update(given[1].memories))
    hidden = module(together).hidden[0]
    both = {name: (m.x[0], m.layout.fields.document[0]) for name, m in memory.items()}
    for number, document in enumerate(documents, 1):
        alone = module(to_batch([[document]], made.vocabulary, declared=declared)).hidden[0]
        mine = hidden[together.layout.fields.document[0] == number]
        torch.testing.assert_close(mine, alone, rtol=1e-9, atol=1e-9)
        for name, m in memory.items():
            x, of = both[name]
            there = m.layout.fields.document[0] == 1
            torch.testing.assert_close(x[of == number], m.x[0][there], rtol=1e-9, atol=1e-9)


class Placed(Transform):
    """A custom transform: cells of a picture seen from its last row, a field, and no word of it."""

    by_length = False

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        return [
            s._replace(
                position=np.arange(len(s.ids))[::-1], fields={"order": np.arange(len(s.ids))}
            )
            if s.values is not None and s.modality == "image"
            else s
            for s in segments
        ]


def test_own_positions_and_fields_reach_the_layout(root: Path) -> None:
    class Said(Placed):
        makes_fields = ("order",)

    with pytest.raises(UserError, match="makes fields 'order' and does not say so"):
        silent = stream(root, "packed", [])
        silent.transforms[0].parts = (Placed(), TRANSFORMS.parse(READ).build())
        for _ in range(4):
            silent.next()
    made = stream(root, "packed", [READ])
    made.transforms[0].parts = (Said(), *made.transforms[0].parts)
    made.declared = made.declared._replace(fields=("order",))
    found = 0
    for _ in range(4):
        (b,) = made.next()
        place, extra = b.layout.fields.position.flatten(0, 1), b.layout.fields.extra["order"]
        for modality, values in b.values.items():
            for first, n in zip(values.place.tolist(), values.length.tolist(), strict=True):
                assert extra.flatten()[first : first + n].tolist() == (
                    list(range(n)) if modality == "image" else [0] * n
                )
                if modality == "image":
                    found += 1
                    own = place[first : first + n]
                    start = own[0, 0]
                    assert (own[:, 1] - start).tolist() == list(range(n))[::-1]
                    assert (own[:, 0] - start).tolist() == list(range(n))
    assert found


def test_two_sequences_share_rows(root: Path) -> None:
    """A row holds what fits of both; a source too long for a row is left out and counted."""
    made = stream(root, "packed", RECIPES["parts"])
    for _ in range(6):
        (b,) = made.next()
        assert b.layout.shape[1] == 96 and b.parts["source"].layout.shape[1] == 40
    lengths = [part_lengths(made.plan_sample(0, 0, i)[0]) for i in range(len(made.sources[0]))]
    assert max(each.get("source", 0) for each in lengths) > 12
    config = made.config.model_copy(update={"part_len": 12})
    short = config.build()
    (found,) = short.survey(4)
    assert found["left_out"]["too_long"]["samples"] > 0


def test_bad_segments_name_the_sample(root: Path) -> None:
    shards = ShardSet.open(root)
    vocabulary = shards.vocabulary
    assert vocabulary is not None
    one = Segment("image", np.full(4, -1), np.zeros((4, 48)), role="condition")
    image = lambda **more: one._replace(**more)
    text = Segment("text", np.zeros(2, int))
    for bad, why in (
        (image(values=np.zeros((4, 47))), r"values \(4, 47\), its tokenizer gives 48"),
        (image(room=3), "room for 3 at 4 places"),
        (image(room=4, role="target"), "need a place each"),
        (image(grid=(2, 3)), r"grid \(2, 3\) has not 4 cells"),
        (image(position=np.zeros((4, 3), int)), "positions of 3 axes"),
        (image(position=np.zeros((3, 2), int)), "positions int64"),
        (image(fields={"a": np.zeros(3, int)}), "field 'a'"),
        (image(part="source", role="target"), "is read, not predicted"),
        (image(role="label"), "label 'image': one of codes"),
        (Segment("text", np.array([999]), role="label"), "a code outside 0..255"),
        (Segment("image", np.zeros(2, int)), "ids in place of values"),
    ):
        with pytest.raises((UserError, ValueError), match=why) as found:
            to_batch([[[bad, text]]], vocabulary, keys=["a/b"])
        if "axes" not in why:
            assert isinstance(found.value, UserError) and "sample 'a/b'" in str(found.value)
    assert document_length([image(part="source"), text]) == 4
    tokens = document_tokens([image(part="source", room=4), text], vocabulary)
    assert len(tokens.ids) == 4 and len(tokens.parts["source"].ids) == 6
    empty = to_batch([[[text]]], vocabulary, declared=Declared(("source",), ("f",), ("image",)))
    assert empty.parts["source"].layout.shape == (1, 1) and len(empty.places["image"]) == 0
