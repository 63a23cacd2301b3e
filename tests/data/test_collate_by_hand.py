"""Documents as tokens, every number written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mm.data.batching.borders import document_length
from mm.data.batching.codebooks import check_places
from mm.data.batching.collate import Piece, axes_of, grids_of, pieces_to_batch, to_batch
from mm.data.batching.document import document_tokens
from mm.layout import Grid
from mm.specs import Segment, TokenSpec
from mm.vocabulary import MASK, NULL, extend_vocabulary

VOCABULARY = extend_vocabulary([TokenSpec("text", 5), TokenSpec("image", 3, grid=(2, 2))])
TEXT, IMAGE = VOCABULARY.range("text"), VOCABULARY.range("image")


def text(*codes: int, **kw) -> Segment:
    return Segment("text", np.array(codes), **kw)


def test_a_target_after_a_condition() -> None:
    image = Segment("image", np.array([0, 2, 1, 0]), role="condition")
    tokens = document_tokens([image, text(4, 0, weight=0.5)], VOCABULARY)
    first, begin = IMAGE.first, TEXT.begin
    stream = [IMAGE.begin, first, first + 2, first + 1, first, IMAGE.end]
    stream += [begin, TEXT.first + 4, TEXT.first, TEXT.end]
    assert tokens.ids.tolist() == stream
    assert tokens.targets.tolist() == [*stream[1:], -1]
    # what place t predicts: the codes and the end of the target, not its begin
    assert tokens.weights.tolist() == [0] * 6 + [0.5] * 3 + [0]
    assert tokens.modality.tolist() == [IMAGE.index] * 6 + [TEXT.index] * 4
    assert tokens.prefix.tolist() == [1] * 6 + [0] * 4
    assert tokens.target_modality.tolist() == [IMAGE.index] * 5 + [TEXT.index] * 4 + [0]
    assert document_length([image, text(4, 0)]) == 10


def test_a_condition_after_a_target_is_no_prefix() -> None:
    given = Segment("image", None, role="condition")
    tokens = document_tokens([given, text(1), text(2, role="condition")], VOCABULARY)
    assert tokens.ids[0] == NULL and tokens.modality[0] == 0
    assert tokens.prefix.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert tokens.weights.tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert document_length([given, text(1), text(2)]) == 7
    late = document_tokens([text(1), given], VOCABULARY)
    assert late.prefix.tolist() == [0, 0, 0, 0] and late.ids[3] == NULL


def test_targets_of_their_own_and_a_cut() -> None:
    f = TEXT.first
    other = document_tokens([text(1, 2, 3, targets=np.array([4, -1, 0]))], VOCABULARY)
    assert other.targets.tolist() == [f + 4, -1, f, TEXT.end, -1]
    assert other.weights.tolist() == [1, 0, 1, 1, 0]
    last = document_tokens([text(1, 2, targets=np.array([1, -1]))], VOCABULARY)
    assert last.weights.tolist() == [1, 0, 1, 0], "the last code is no target, the end is one"
    cut = document_tokens([text(1, 2, targets=np.array([1, 2, -1]))], VOCABULARY)
    assert cut.targets.tolist() == [f + 1, f + 2, TEXT.end, -1]
    assert cut.weights.tolist() == [1, 1, 0, 0], "the end stands there and is not learned"
    whole = document_tokens([text(1, targets=np.array([1, 3]))], VOCABULARY)
    assert whole.weights.tolist() == [1, 1, 0]


def test_hidden_codes_of_a_condition_are_predicted_where_they_stand() -> None:
    masked = np.array([False, True, False])
    given = text(1, 2, 3, role="condition", weight=0.25, fields={"masked": masked})
    tokens = document_tokens([given, text(0)], VOCABULARY)
    f = TEXT.first
    assert tokens.ids.tolist()[:5] == [TEXT.begin, f + 1, MASK, f + 3, TEXT.end]
    assert tokens.targets[2] == f + 2 and tokens.weights.tolist()[:5] == [0, 0, 0.25, 0, 0]


def test_what_is_no_plain_token_is_refused() -> None:
    for code in (-1, 5):
        with pytest.raises(ValueError, match=r"outside 0\.\.4"):
            document_tokens([text(0, code)], VOCABULARY)
    with pytest.raises(ValueError, match="a target needs ids"):
        document_tokens([Segment("text", None)], VOCABULARY)
    for more, why in (
        ({"position": np.zeros((1, 1))}, r"positions float64 \(1, 1\) at 1 places"),
        ({"part": "x"}, "part 'x' goes with nothing"),
        ({"room": 1}, "room for 1 values, and none there"),
        ({"fields": {"a": 0.5}}, "field 'a': float64"),
        ({"fields": {"a": np.ones(2, int)}}, "one integer or one a code"),
        ({"fields": {"prefix": 1}}, "field 'prefix' is made by packing"),
        ({"values": np.zeros((1, 2))}, "values of a modality of ids"),
    ):
        with pytest.raises(ValueError, match=why):
            document_tokens([text(0)._replace(**more)], VOCABULARY)
    with pytest.raises(ValueError, match="can be masked"):  # a target is not hidden
        document_tokens([text(0, fields={"masked": np.array([True])})], VOCABULARY)
    assert len(document_tokens([], VOCABULARY).ids) == 0
    assert document_tokens([text()], VOCABULARY).ids.tolist() == [TEXT.begin, TEXT.end]


def test_grids_whole_broken_off_and_hidden() -> None:
    codes = IMAGE.first + np.array([0, 1, 2, 0])
    of = lambda *ids: [g.length for g in grids_of(np.array(ids), VOCABULARY)]
    (grid,) = grids_of(np.array([TEXT.begin, IMAGE.begin, *codes, IMAGE.end]), VOCABULARY)
    assert grid == Grid(2, (2, 2), 1, 4)
    assert of(IMAGE.begin, *codes[:3]) == [3], "the row ends"
    assert of(IMAGE.begin, *codes[:2], IMAGE.end, *codes) == [2], "an end below the codes"
    assert of(IMAGE.begin, codes[0], IMAGE.stop, *codes) == [1], "an id above them"
    assert of(IMAGE.begin, codes[0], MASK, *codes[:2]) == [4], "hidden codes are there"
    assert of(IMAGE.begin, IMAGE.begin, *codes) == [0, 4]
    assert axes_of(VOCABULARY) == 3
    line = extend_vocabulary([TokenSpec("text", 5), TokenSpec("image", 3, grid=(4,))])
    assert axes_of(line) == 1
    start = line.range("image")
    assert grids_of(np.array([start.begin, start.first]), line) == []


def test_places_of_several_codebooks_that_are_no_layout_are_refused() -> None:
    """Two codebooks of ten codes: 0 to 9 stand in the first stream, 10 to 19 in the second."""
    spec = TokenSpec("audio", 10, 2)
    of = lambda *places: check_places(np.array(places), spec)
    assert of((1, -1), (2, 11), (-1, 12)) == 2
    for places, why in (
        (((1, -1), (-1, 11), (2, 12)), "the first codebook has a gap"),
        (((1, 11, 12),), "3 codes a place of 2 codebooks"),
        (((1, 11), (2, 3)), "code 3 is not of codebook 1"),
        (((12, 11),), "code 12 is not of codebook 0"),
    ):
        with pytest.raises(ValueError, match=f"segment 'audio': {why}"):
            of(*places)


def test_rows_of_documents_by_hand() -> None:
    batch = to_batch([[[text(1)], [text(2, 3)]], [[text(4)]]], VOCABULARY, 8, 4, ("a", "b"))
    f, (begin, end) = TEXT.first, TEXT[1:3]
    one, two, three = [begin, f + 1, end], [begin, f + 2, f + 3, end], [begin, f + 4, end]
    assert batch.ids[..., 0].tolist() == [[*one, *two, -1], [*three, *[-1] * 5]]
    assert batch.targets[..., 0].tolist() == [
        [*one[1:], -1, *two[1:], -1, -1],
        [*three[1:], *[-1] * 6],
    ]
    assert batch.weight.tolist() == [[1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.places["tokens"].tolist() == [0, 1, 3, 4, 5, 8, 9]
    t = TEXT.index
    assert batch.labels["target_modality"].tolist() == [
        [t, t, 0, t, t, t, 0, 0],
        [t, t, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.layout.fields.document.tolist() == [
        [1, 1, 1, 2, 2, 2, 2, 0],
        [3, 3, 3, 0, 0, 0, 0, 0],
    ]
    assert batch.layout.cu_seqlens.tolist() == [0, 3, 8, 16, 16] and batch.keys == ("a", "b")


def test_pieces_keep_their_place_and_slot() -> None:
    tokens = document_tokens([text(1, 2)], VOCABULARY)
    piece = Piece(tokens, tokens.target_modality, start=6, slot=1, fresh=False)
    layout = pieces_to_batch([[piece]], VOCABULARY).layout
    assert layout.fields.position[0, :, 0].tolist() == [6, 7, 8, 9]
    assert layout.slot.tolist() == [1] and layout.fresh.tolist() == [False]
    assert layout.fields.position.shape[-1] == 3 and "prefix" in layout.fields.extra
