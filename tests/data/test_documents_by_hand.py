"""What streams of documents tell before they read: what every batch has, whatever its rows hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from mm.data.batching.collate import Declared
from mm.data.streams.blocks import sketch_of
from mm.data.streams.documents import DocumentStream
from mm.data.transforms.compose import chain
from mm.specs import Segment, TokenSpec
from mm.vocabulary import extend_vocabulary


def test_all_ranks_declare_the_same_in_the_same_order() -> None:
    """Sorted: the order of a set of words is another one in every process."""
    values = [TokenSpec(m, 0, continuous=True, n_features=2) for m in ("y", "x", "w")]
    codes = [TokenSpec(m, 4, 2) for m in ("b", "a")]
    names = "hgfedcba"
    steps: list[Any] = [{"kind": "mark", "field": name} for name in names]
    steps += [{"kind": "to_part", "part": name} for name in names]
    steps += [{"kind": "any_to_any", "tasks": {"a>y": 1, "x": 1, "w>b": 1}}]
    steps += [{"kind": "to_label", "modalities": list(names)}]
    steps += [{"kind": "delay", "delays": {"b": [0, 1], "a": [0, 0]}}]
    stream: Any = SimpleNamespace(
        vocabulary=extend_vocabulary([*values, *codes]), transforms=[chain(*steps)]
    )
    stream._delays = lambda own: DocumentStream._delays(stream, own)
    names = tuple("abcdefgh")
    found = DocumentStream._declare(stream)
    assert found == Declared(names, names, ("x", "y"), names, ("a", "b"))


def test_a_sketch_is_of_whole_segments_alone() -> None:
    """Codes, targets or values that a transform made itself cannot be filled in later."""
    text, image = Segment("text", np.zeros(2)), Segment("image", np.zeros(3))
    condition, null = text._replace(role="condition"), Segment("audio", None, role="condition")
    made = [condition, null, image]
    assert sketch_of([text, image], made) == (("text", condition), ("", null), ("image", image))
    for own in (
        image._replace(ids=np.zeros(3)),
        image._replace(targets=image.ids),
        image._replace(values=np.zeros((3, 2))),
    ):
        assert sketch_of([text, image], [condition, own]) is None
