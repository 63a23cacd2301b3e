"""Span denoising and fill-in-the-middle: nothing is lost, and the shares are those asked for."""

from __future__ import annotations

import numpy as np
import pytest

from mm.data.batching.collate import document_tokens
from mm.data.transforms.fill_in_the_middle import FillInTheMiddleConfig
from mm.data.transforms.span_denoising import Denoiser, SpanDenoisingConfig, cut
from mm.specs import Segment, TokenSpec
from mm.vocabulary import Vocabulary

VOCABULARY = Vocabulary().add(TokenSpec("text", 1000))
TEXT = VOCABULARY.range("text")


def text(n: int) -> Segment:
    return Segment("text", np.arange(n))


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.5, 8.0), (0.15, 20.0), (0.25, 0.0)])
@pytest.mark.parametrize("n", [2, 3, 10, 400])
def test_holes_and_what_is_around_them_are_the_whole(rate: float, mean: float, n: int) -> None:
    transform = SpanDenoisingConfig(denoisers=(Denoiser(rate=rate, mean=mean),)).build()
    for seed in range(20):
        made = transform([text(n)], np.random.default_rng(seed))
        assert made is not None
        given = [s for s in made if s.role == "condition"]
        asked = [s for s in made if s.role == "target"]
        assert made == [*given, *asked] and len(given) == len(asked)
        back = [x.ids for pair in zip(given, asked, strict=True) for x in pair]
        assert np.concatenate(back).tolist() == list(range(n))
        assert all(len(s.ids) for s in made)
        lost = sum(len(s.ids) for s in asked)
        assert lost == max(1, min(n - 1, round(n * rate)))
        if mean and n == 400:
            assert lost / len(asked) == pytest.approx(mean, rel=0.12)
        if mean == 0:
            assert len(made) == 2


def test_there_are_no_more_holes_than_codes_are_kept() -> None:
    """Nine of ten codes go, one in each hole if it could: the one that stays stands before one."""
    assert cut(10, Denoiser(rate=0.9, mean=1), np.random.default_rng(0)) == ([(0, 1)], [(1, 10)])


def test_the_lengths_of_holes_differ_and_a_denoiser_is_drawn_by_weight() -> None:
    mixture = (Denoiser(weight=3.0), Denoiser(rate=0.25, mean=0, weight=1.0))
    transform = SpanDenoisingConfig(denoisers=mixture).build()
    made = [transform([text(200)], np.random.default_rng(i)) or [] for i in range(400)]
    assert abs(sum(len(m) == 2 for m in made) / 400 - 0.25) < 0.06
    sizes = [len(s.ids) for m in made if len(m) > 2 for s in m if s.role == "target"]
    assert len({*sizes}) > 8


def test_a_hole_is_a_border_of_conditions_and_its_filling_a_target_with_an_end() -> None:
    transform = SpanDenoisingConfig().build()
    made = transform([text(20)], np.random.default_rng(0))
    assert made is not None
    d = document_tokens(made, VOCABULARY)
    stops = np.flatnonzero(d.ids == TEXT.end)
    given = sum(s.role == "condition" for s in made)
    first = int(stops[given - 1]) + 1
    assert d.prefix.tolist() == [1] * first + [0] * (len(d.ids) - first)
    predicted = d.targets[d.weights > 0].tolist()
    wanted = [c + TEXT.first for s in made[given:] for c in [*s.ids, TEXT.end - TEXT.first]]
    assert predicted == wanted


def test_other_samples_stay_as_they_are() -> None:
    one = [Segment("image", np.arange(5))]
    two = [text(4), Segment("image", np.arange(5))]
    for transform in (SpanDenoisingConfig().build(), FillInTheMiddleConfig(rate=1).build()):
        for sample in (one, two, [text(1)], []):
            assert transform(sample, np.random.default_rng(0)) is sample


@pytest.mark.parametrize("suffix_first", [0.0, 1.0])
def test_the_middle_comes_last_and_cut_ends_are_no_targets(suffix_first: float) -> None:
    transform = FillInTheMiddleConfig(rate=1.0, suffix_first=suffix_first).build()
    for seed in range(20):
        made = transform([text(30)], np.random.default_rng(seed))
        assert made is not None and len(made) == 3
        end, start = made[:2] if suffix_first else made[1::-1]
        middle = made[2]
        back = np.concatenate([start.ids, middle.ids, end.ids])
        assert back.tolist() == list(range(30)) and all(len(s.ids) for s in made)
        d = document_tokens(made, VOCABULARY)
        predicted = d.targets[d.weights > 0]
        assert (predicted == TEXT.end).sum() == 2, "of the end of the text, and of its middle"
        assert sorted((predicted[predicted != TEXT.end] - TEXT.first).tolist()) == list(range(30))


def test_moved_pieces_keep_their_own_targets() -> None:
    """Code n predicts 100 + n, wherever its piece goes; only cut pieces have the mark of a cut."""
    given = text(12)._replace(targets=np.arange(100, 112))
    for seed in range(20):
        made = FillInTheMiddleConfig(rate=1.0, suffix_first=0.0).build()(
            [given], np.random.default_rng(seed)
        )
        assert made is not None
        for s, mark in zip(made, ([-1], [], []), strict=True):
            assert s.targets.tolist() == [*(100 + s.ids), *mark]


def test_a_share_of_samples_is_moved() -> None:
    transform = FillInTheMiddleConfig(rate=0.3).build()
    moved = [len(transform([text(9)], np.random.default_rng(i)) or []) == 3 for i in range(500)]
    assert abs(np.mean(moved) - 0.3) < 0.06
