"""Which ids a decoder may draw, and how it draws them."""

from __future__ import annotations

import pytest
import torch
from generation_toys import VOCABULARY, V, session

from mm.decoders import rules
from mm.decoders.base import draw, noise


def allowed(to: str, *length: int, limit: int = 100) -> list[list[int]]:
    """Ids with probability above 0 at each span length, after the grammar and a softmax."""
    logits = torch.randn(len(length), V, generator=torch.Generator().manual_seed(0)) * 30
    prob = torch.softmax(rules.span_grammar(logits, session(to, *length, limit=limit)), -1)
    assert torch.allclose(prob.sum(-1), torch.ones(len(length)))
    masked = torch.isfinite(
        rules.span_grammar(torch.zeros(len(length), V), session(to, *length, limit=limit))
    )
    assert (prob[~masked] == 0).all()  # exactly 0, not small
    return [row.nonzero()[:, 0].tolist() for row in masked]


def test_text_span_is_only_text_and_ends_when_it_likes_but_not_at_once():
    r = VOCABULARY.range("text")
    codes = list(range(r.first, r.stop))
    assert allowed("text", 0, 1, 7, 8, limit=8) == [
        codes,
        [r.end, *codes],
        [r.end, *codes],
        [r.end],
    ]


def test_grid_ends_after_exactly_its_cells():
    r = VOCABULARY.range("image")
    codes = list(range(r.first, r.stop))
    # The limit does not shorten a grid.
    assert allowed("image", 0, 5, 6, limit=2) == [codes, codes, [r.end]]


def test_books_take_turns_and_the_end_stands_at_frame_borders():
    r = VOCABULARY.range("audio")
    first, second = list(range(r.first, r.first + 5)), list(range(r.first + 5, r.stop))
    assert allowed("audio", 0, 1, 2, 3, 4, limit=4) == [
        first,
        second,
        [r.end, *first],
        second,
        [r.end],
    ]
    assert allowed("audio", 3, 4, limit=3) == [
        second,
        [r.end],
    ]  # a limit inside a frame waits for its border


def test_grid_of_frames():
    r = VOCABULARY.range("deep")
    book = lambda q: list(range(r.first + 4 * q, r.first + 4 * q + 4))
    assert allowed("deep", 0, 1, 2, 3, 5, 6) == [
        book(0),
        book(1),
        book(2),
        book(0),
        book(2),
        [r.end],
    ]


def test_top_k_keeps_k_and_ties():
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0], [5.0, 5.0, 5.0, 0.0]])
    kept = torch.isfinite(rules.top_k(2)(logits, session("text", 0, 0)))
    assert kept.tolist() == [[False, True, True, False], [True, True, True, False]]
    assert torch.equal(rules.top_k(9)(logits, session("text", 0, 0)), logits)
    with pytest.raises(ValueError):
        rules.top_k(0)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    prob = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]], dtype=torch.float64)
    kept = lambda p: torch.isfinite(rules.top_p(p)(prob.log(), session("text", 0, 0))).tolist()
    assert kept(0.4) == [[True, False, False, False], [False, False, False, True]]
    assert kept(0.7) == [[True, True, False, False], [False, False, True, True]]
    assert kept(0.9) == [[True, True, True, False], [False, True, True, True]]
    assert kept(1.0) == [[True] * 4] * 2
    assert kept(1e-9) == [[True, False, False, False], [False, False, False, True]]  # never empty


def test_temperature_divides():
    logits = torch.tensor([[1.0, 2.0]])
    assert rules.temperature(0.5)(logits, session("text", 0)).tolist() == [[2.0, 4.0]]
    with pytest.raises(ValueError):
        rules.temperature(0.0)


def test_draw_follows_the_distribution_and_never_takes_a_forbidden_id():
    prob = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    logits = prob.log().expand(20000, -1)
    ids = draw(logits, noise(3, range(20000), 1)[:, 0])
    share = torch.bincount(ids, minlength=6) / 20000
    assert torch.allclose(share, prob, atol=0.015)
    assert (share[prob == 0] == 0).all()
    edge = torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64)
    assert draw(prob.log().expand(2, -1), edge).tolist() == [1, 4]


def test_noise_of_a_sequence_depends_on_seed_and_its_index_alone():
    table = noise(1, [0, 1, 2], 5)
    assert torch.equal(table[1:2], noise(1, [1], 5))
    assert torch.equal(table[:, :3], noise(1, [0, 1, 2], 3))
    assert not torch.equal(table, noise(2, [0, 1, 2], 5))
    assert len(set(table.flatten().tolist())) == 15
