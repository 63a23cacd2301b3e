"""Rows of codes alone, laid out at once: bit by bit the batch that documents one by one give."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from mm.data.batching import collate
from mm.data.batching.collate import Declared, to_batch
from mm.errors import UserError
from mm.specs import Segment, TokenSpec
from mm.vocabulary import extend_vocabulary

VOCABULARY = extend_vocabulary(
    [
        TokenSpec("text", 20, fingerprint="t"),
        TokenSpec("image", 8, grid=(2, 3), fingerprint="i"),
        TokenSpec("audio", 5, n_codebooks=2, fingerprint="a"),
        TokenSpec("deep", 4, n_codebooks=2, grid=(3, 2), fingerprint="d"),
        TokenSpec("also", 4, grid=(2, 3), fingerprint="s"),
        TokenSpec("line", 4, grid=(3,), fingerprint="l"),
        TokenSpec("mel", 0, continuous=True, n_features=3, fingerprint="m"),
    ]
)
IDS = {"text": 20, "image": 8, "audio": 10, "deep": 8, "also": 4, "line": 4}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every value of a batch by its place; a tensor with its dtype and strides."""
    if isinstance(value, Tensor):
        return {path: (value.dtype, value.shape, value.stride(), value.tolist())}
    if is_dataclass(value):
        found = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "memo"}
    elif hasattr(value, "_asdict"):
        found = value._asdict()
    elif isinstance(value, dict):
        found = {str(k): v for k, v in value.items()}
    else:
        return {path: value}
    return {path: sorted(found)} | {
        k: v for name, each in found.items() for k, v in leaves(each, f"{path}.{name}").items()
    }


def assert_same(a: Any, b: Any) -> None:
    one, two = leaves(a), leaves(b)
    assert {k: (one.get(k), v) for k, v in two.items() if one.get(k) != v} == {}
    assert one.keys() == two.keys()


def document(draw: Random) -> list[Segment]:
    out = []
    for _ in range(draw.randint(1, 4)):
        name, role = draw.choice([*IDS]), draw.choice(["condition", "target"])
        if draw.random() < 0.15:
            out.append(Segment(name, None, role="condition"))
            continue
        n = draw.choice([0, 1, 3, 6, 6, 12, 14])  # cut short, whole and longer than its grid
        codes = np.array([draw.randrange(IDS[name]) for _ in range(n)], np.int32)
        out.append(Segment(name, codes, role=role, weight=draw.choice([1.0, 1.0, 0.3, 0.0])))
    return out


def by_document(*args: Any, **kw: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collate, "plain_batch", lambda *_: None)
        return to_batch(*args, **kw)


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_codes_are_what_documents_one_by_one_give(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Random(seed)
    rows = [[document(draw) for _ in range(draw.randint(0, 4))] for _ in range(draw.randint(1, 4))]
    rows[0].append(document(draw))
    keys = [f"k{i}" for i in range(sum(map(len, rows)))]
    seq_len, most = draw.choice([(None, None), (300, None), (300, 40)])
    declared = draw.choice([None, Declared()])
    slow = by_document(rows, VOCABULARY, seq_len, most, keys)
    monkeypatch.setattr(collate, "pieces_to_batch", None)  # the quick way alone
    quick = to_batch(rows, VOCABULARY, seq_len, most, keys, declared)
    assert_same(quick, slow)


def test_shards_codes_are_views_of_bytes_at_odd_places() -> None:
    data = np.zeros(25, np.uint8)
    codes = data[1:].view("<i4")
    codes[:] = range(6)
    rows = [[[Segment("image", codes)]]]
    assert_same(to_batch(rows, VOCABULARY), by_document(rows, VOCABULARY))


CODES, NO_IDS = np.arange(3, dtype=np.int32), np.full(3, -1, np.int32)
OTHERS: dict[str, Segment] = {
    "a list": Segment("text", [1, 2]),
    "wide numbers": Segment("text", CODES.astype(np.int64)),
    "targets": Segment("text", CODES, targets=CODES[::-1].copy()),
    "a field": Segment("text", CODES, fields={"mark": 1}),
    "masked": Segment("text", CODES, role="condition", fields={"masked": CODES > 1}),
    "a position": Segment("text", CODES, position=CODES),
    "a label": Segment("text", CODES, role="label"),
    "inline": Segment("image", CODES, role="condition", inline=True),
    "a part": Segment("text", CODES, role="condition", part="second"),
    "values": Segment(
        "mel", np.full(3, -1, np.int32), np.zeros((3, 3), np.float32), role="condition"
    ),
    "codebooks": Segment("audio", np.array([[0, 5], [2, 6]], np.int32)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_more_than_codes_goes_document_by_document(case: str) -> None:
    rows = [[[OTHERS[case], Segment("text", CODES)], [Segment("text", CODES)]]]
    assert_same(to_batch(rows, VOCABULARY), by_document(rows, VOCABULARY))


WRONG: dict[str, tuple[Segment, str]] = {
    "too large": (Segment("image", np.array([0, 8], np.int32)), "sample 'b': .*0..8 outside 0..7"),
    "below 0": (Segment("image", np.array([-1], np.int32)), "sample 'b': .*-1..-1 outside 0..7"),
    "no ids": (Segment("text", None), "a target needs ids"),
    "no modality": (Segment("video", CODES), "video"),
    "ids of values": (Segment("mel", CODES), "ids in place of values"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_as_ever(case: str) -> None:
    wrong, why = WRONG[case]
    with pytest.raises(UserError, match=why):
        to_batch([[[Segment("text", CODES)], [wrong]]], VOCABULARY, keys=["a", "b"])


def test_rows_that_do_not_fit_are_refused() -> None:
    rows = [[[Segment("text", CODES)]] * 3]
    for sizes, why in (((14, 9), "does not fit seq_len 14"), ((15, 2), "do not fit max_documents")):
        with pytest.raises(ValueError, match=why):
            to_batch(rows, VOCABULARY, *sizes)
    assert_same(to_batch(rows, VOCABULARY, 15), by_document(rows, VOCABULARY))
