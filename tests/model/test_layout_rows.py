"""Layouts of a few documents, every field written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mm.layout import Doc, Grid, Layout, places_of


def values(tensor: torch.Tensor) -> Any:
    return tensor.tolist()


def test_every_field_of_two_rows() -> None:
    layout = Layout.from_rows(
        [
            [Doc(2, slot=3, fresh=False, start=4), Doc(1, modality=[2], extra={"stream": [5]})],
            [Doc(3, position=[[7], [8], [9]], modality=[1, 1, 2])],
        ],
        seq_len=4,
        max_documents=5,
    )
    assert layout.shape == (2, 4)
    assert values(layout.fields.position[..., 0]) == [[4, 5, 0, 0], [7, 8, 9, 0]]
    assert values(layout.fields.document) == [[1, 1, 2, 0], [3, 3, 3, 0]]
    assert values(layout.fields.modality) == [[0, 0, 2, 0], [1, 1, 2, 0]]
    assert values(layout.fields.extra["stream"]) == [[0, 0, 5, 0], [0, 0, 0, 0]]
    assert values(layout.cu_seqlens) == [0, 2, 4, 8, 8, 8]
    assert values(layout.slot) == [3, -1, -1, -1, -1]
    assert values(layout.fresh) == [False, True, True, True, True]
    assert layout.max_seqlen == 3 and not layout.aligned and layout.grids == {}


def test_defaults_are_the_longest_row_and_all_documents() -> None:
    layout = Layout.from_rows([[Doc(2), Doc(3)], [Doc(1)]])
    assert layout.shape == (2, 5) and values(layout.cu_seqlens) == [0, 2, 5, 10]
    empty = Layout.from_rows([])
    assert empty.shape == (0, 0) and empty.max_seqlen == 0 and values(empty.cu_seqlens) == [0]
    bare = Layout.from_rows([[]], 3)
    assert bare.shape == (1, 3) and bare.max_seqlen == 0 and values(bare.cu_seqlens) == [3]


def test_what_does_not_fit_is_refused() -> None:
    assert Layout.from_rows([[Doc(2), Doc(1)]], 3, 2).shape == (1, 3)
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit seq_len 2"):
        Layout.from_rows([[Doc(1)], [Doc(2), Doc(1)]], 2)
    with pytest.raises(ValueError, match="2 documents do not fit max_documents 1"):
        Layout.from_rows([[Doc(2), Doc(1)]], 3, 1)


@pytest.mark.parametrize(
    ("rows", "aligned"),
    [
        ([[Doc(2)], [Doc(1)]], True),
        ([[Doc(2, slot=0)], [Doc(1, slot=1)]], True),
        ([[Doc(2, slot=1)], [Doc(1, slot=0)]], False),
        ([[Doc(2, slot=0)], [Doc(1, slot=2)]], False),
        ([[Doc(1), Doc(1)], [Doc(1)]], False),
        ([[Doc(1), Doc(1)], []], False),
        ([[Doc(1)], []], False),
    ],
)
def test_aligned_is_one_document_a_row_in_the_rows_slot(rows: Any, aligned: bool) -> None:
    assert Layout.from_rows(rows, 2).aligned is aligned


def test_places_of_a_grid_and_of_what_stands_around() -> None:
    doc = Doc(9, start=10, grids=[Grid(1, (2, 3))])
    time = list(range(10, 19))
    row = [10, 11, 11, 11, 12, 12, 12, 17, 18]
    column = [10, 11, 12, 13, 11, 12, 13, 17, 18]
    assert places_of(doc, 3).T.tolist() == [time, row, column]
    assert places_of(doc, 2).T.tolist() == [time, row]
    books = Doc(5, grids=[Grid(1, (1, 2), books=2)])
    assert places_of(books, 3)[:, 2].tolist() == [0, 1, 1, 2, 2]
    part = Doc(3, grids=[Grid(1, (2, 2), length=2)])
    assert places_of(part, 3)[:, 1].tolist() == [0, 1, 1]


def test_whole_grids_are_listed_by_shape_and_book() -> None:
    layout = Layout.from_rows(
        [
            [Doc(1), Doc(5, grids=[Grid(1, (2, 2))])],
            [Doc(4, grids=[Grid(0, (1, 2), books=2)]), Doc(1, grids=[Grid(0, (2, 2), length=1)])],
        ],
        6,
        axes=3,
    )
    found = {shape: values(places) for shape, places in layout.grids.items()}
    assert found == {(2, 2): [[2, 3, 4, 5]], (1, 2): [[6, 8], [7, 9]]}
    # in row 1: document of one place, then time, row and column of the grid behind one place
    assert values(layout.fields.position[0].T) == [
        [0, 0, 1, 2, 3, 4],
        [0, 0, 1, 1, 2, 2],
        [0, 0, 1, 2, 1, 2],
    ]


def test_a_moved_layout_by_hand() -> None:
    """Two documents, each turned round; the second is then taken out."""
    stream = {"stream": [5, 6, 7, 8]}
    doc = Doc(4, slot=0, grids=[Grid(0, (2, 2))], modality=[1, 2, 3, 4], extra=stream)
    layout = Layout.from_rows([[doc, Doc(2, slot=1)]], 7, axes=2)
    index = torch.tensor([3, 2, 1, 0, 5, 4, 6])
    moved = layout.derive(index)
    assert values(moved.fields.position[0, :, 0]) == [3, 2, 1, 0, 1, 0, 0]
    assert values(moved.fields.position[0, :, 1]) == [1, 1, 0, 0, 1, 0, 0]
    assert values(moved.fields.modality[0]) == [4, 3, 2, 1, 0, 0, 0]
    assert values(moved.fields.extra["stream"][0]) == [8, 7, 6, 5, 0, 0, 0]
    assert values(moved.grids[2, 2]) == [[3, 2, 1, 0]]
    stays = layout.derive(index, time="stays", slots=False)
    assert values(stays.fields.position[0, :, 0]) == [0, 1, 2, 3, 0, 1, 0]
    assert values(stays.fields.position[0, :, 1]) == [1, 1, 0, 0, 1, 0, 0]
    assert values(stays.slot) == [-1, -1] and values(moved.slot) == [0, 1]
    number = torch.tensor([[0, 0, 0, 0, 2, 2, 0]], dtype=torch.int32)
    left = layout.derive(document=number)
    assert values(left.cu_seqlens) == [4, 4, 7] and values(left.fields.document) == values(number)
    assert np.array_equal(left.fields.position, layout.fields.position)


def test_all_of_a_layout_moves() -> None:
    doc = Doc(4, extra={"stream": [1, 2, 3, 4]}, grids=[Grid(0, (2, 2))])
    there = Layout.from_rows([[doc]], axes=3).to("meta")
    fields = there.fields
    tensors = [fields.position, fields.document, fields.modality, *fields.extra.values()]
    tensors += [there.cu_seqlens, there.slot, there.fresh, *there.grids.values()]
    assert len(tensors) == 8 and all(t.device.type == "meta" for t in tensors)
