"""Values that stand inside the text around them: no begin and no end of theirs, nor of the text."""

from __future__ import annotations

import numpy as np
import pytest

from mm.data.batching.borders import document_length, segment_lengths
from mm.data.batching.document import document_tokens
from mm.decoders.prompts import batch, prepare
from mm.errors import UserError
from mm.specs import Segment, TokenSpec
from mm.vocabulary import Vocabulary, extend_vocabulary

WORDS = extend_vocabulary(
    [
        TokenSpec("text", 20),
        TokenSpec("image", 0, continuous=True, n_features=4, inline=True),
        TokenSpec("audio", 7),
    ]
)
T, P, A = (WORDS.range(name) for name in WORDS.modalities)


def text(*codes: int, role: str = "condition") -> Segment:
    return Segment("text", np.array(codes, np.int32), role=role)


def image(n: int = 3) -> Segment:
    values = np.arange(4 * n, dtype=np.float32).reshape(n, 4)
    return Segment("image", np.full(n, -1), values, role="condition", inline=True)


AUDIO = Segment("audio", np.array([2]), role="target")
NULL = Segment("text", role="condition")
first = lambda *codes: [T.first + c for c in codes]
HOLE = [-1, -1, -1]
CASES = {
    "between": ([text(1, 2), image(), text(5)], [T.begin, *first(1, 2), *HOLE, *first(5), T.end]),
    "first": ([image(), text(5)], [T.begin, *HOLE, *first(5), T.end]),
    "last": ([text(1), image()], [T.begin, *first(1), *HOLE, T.end]),
    "two": ([image(), image(), text(5)], [T.begin, *HOLE, *HOLE, *first(5), T.end]),
    "alone": ([image()], [P.begin, *HOLE, P.end]),
    "other ids behind": (
        [text(1), image(), AUDIO],
        [T.begin, *first(1), *HOLE, T.end, A.begin, A.first + 2, A.end],
    ),
    "two texts": ([text(1), text(2)], [T.begin, *first(1), T.end, T.begin, *first(2), T.end]),
    "behind nothing": ([NULL, image(), text(5)], [1, T.begin, *HOLE, *first(5), T.end]),
}


@pytest.mark.parametrize("case", CASES)
def test_ids(case: str) -> None:
    segments, ids = CASES[case]
    found = document_tokens(segments, WORDS)
    assert found.ids.tolist() == ids
    assert document_length(segments) == sum(segment_lengths(segments)) == len(ids)
    starts = [f.start for f in found.features]
    assert all(found.ids[at : at + 3].tolist() == HOLE for at in starts)
    assert (found.modality[found.ids < 0] == P.index).all()
    own = WORDS.modality_of(found.ids[found.ids >= 0])
    assert (found.modality[found.ids >= 0] == own).all()


def test_what_is_learnt_is_the_text_behind_it_and_its_end() -> None:
    found = document_tokens([text(1, 2), image(), text(5, 6, role="target")], WORDS)
    assert found.targets[found.weights > 0].tolist() == [*first(5, 6), T.end]
    assert found.ids[found.weights > 0].tolist() == [-1, *first(5, 6)], "the last place tells it"
    assert found.prefix.tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0]


def test_a_prompt_goes_on_where_training_did() -> None:
    for given in ([image()], [text(1), image()], [image(), text(4)]):
        whole = document_tokens([*given, text(5, role="target")], WORDS)
        prompt = prepare([*given, text(role="target")], "text", WORDS, 4, "it").tokens
        n = len(prompt.ids)
        assert prompt.ids.tolist() == whole.ids[:n].tolist() and whole.ids[n] == first(5)[0]
        made = batch([prompt], WORDS).layout.fields.extra["prefix"]
        assert made[0].tolist() == whole.prefix[:n].tolist()


def test_a_vocabulary_keeps_it() -> None:
    again = Vocabulary.from_json(WORDS.to_json())
    assert again == WORDS and again.spec("image").inline
    assert "inline" not in extend_vocabulary([TokenSpec("text", 3)]).to_json()
    wrong = WORDS.to_json().replace('"vocab_size": 20,', '"vocab_size": 20, "inline": true,', 1)
    with pytest.raises(UserError, match="only values stand inline"):
        Vocabulary.from_json(wrong)
