"""Objective `replaced_token` against its formula, with networks whose answers are written down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from model_toys import VOCABULARY, make
from torch import Tensor

from mm.batch import Batch
from mm.data.batching.collate import to_batch
from mm.errors import UserError
from mm.model.heads.binary import Bernoulli
from mm.model.heads.softmax import Categorical
from mm.model.layer import HeadOut, ModelOut
from mm.objectives.objective import LossTerm
from mm.registry import OBJECTIVES
from mm.specs import Segment

TEXT = VOCABULARY.range("text")
CODES = TEXT.stop - TEXT.first


def objective(**settings: Any) -> Any:
    small = cast(Any, OBJECTIVES.get("replaced_token").smallest()).to_dict()
    return cast(Any, OBJECTIVES.parse(small | settings)).build(VOCABULARY)


def batch(n: int = 40, rows: int = 3) -> Batch:
    draw = np.random.default_rng(0)
    return to_batch(
        [[[Segment("text", draw.integers(0, CODES, n + r))]] for r in range(rows)], VOCABULARY
    )


def run(made: Any, given: list[Batch], logits: Tensor, score: Any) -> Iterator[tuple[Any, Any]]:
    """Every term, with the batch that its network saw. ``logits`` `(N,)` of the generator."""
    seen: list[Batch] = []

    def generator(b: Batch, **_: Any) -> ModelOut:
        seen.append(b)
        told = Categorical(logits.expand(len(b.places["tokens"]), -1))
        return ModelOut(b.ids, {"tokens": HeadOut(None, told)}, None, {}, {})

    def model(b: Batch, **_: Any) -> ModelOut:
        seen.append(b)
        nll = -Bernoulli(score(b)).log_prob(b.head_targets["replaced"])
        return ModelOut(b.ids, {"replaced": HeadOut(nll, None)}, None, {}, {})

    nets = {"generator": generator, "model": model}
    term: LossTerm
    for term in made.terms(given, nets, cast(Any, None)):
        yield term, seen[-1]


def test_the_losses_are_the_papers() -> None:
    made, plain = objective(rate=0.5), batch()
    hidden = made.corrupt(plain, None, {"noise": 7.0})
    masked = hidden.ids[..., 0] != plain.ids[..., 0]
    logits = torch.full((VOCABULARY.size,), -9.0)
    always = TEXT.first + 4
    logits[always] = 9.0
    score = lambda b: torch.linspace(-2, 2, b.ids.numel())
    first, second = run(made, [hidden], logits, score)
    (term, saw), (judged, shown) = first, second
    assert torch.equal(saw.ids, hidden.ids) and 10 < int(masked.sum()) < 110
    nll = torch.logsumexp(logits, 0) - logits[plain.ids[..., 0][masked].long()]
    torch.testing.assert_close(term.losses["text"], nll.sum())
    assert term.network == "generator" and term.step and judged.network == "model" and judged.step
    # The draw stands where the mask was, all else is as it was.
    assert torch.equal(shown.ids[..., 0], torch.where(masked, always, plain.ids[..., 0]))
    every = torch.arange(plain.ids.numel(), dtype=torch.int32)
    torch.testing.assert_close(shown.places["replaced"], every, rtol=0, atol=0)
    other = (masked & (plain.ids[..., 0] != always)).flatten()
    assert 0 < int(masked.sum()) - int(other.sum()), "a draw of the true id counts as real"
    d = 1 - score(shown).sigmoid()  # probability of a real token
    each = -torch.where(other, (1 - d).log(), d.log())
    real = (plain.layout.fields.document > 0).flatten()
    torch.testing.assert_close(judged.losses["replaced"], each[real].sum())
    n = made.counts(hidden)
    assert int(n["replaced"]) == int(real.sum()) and int(n["text"]) == int(masked.sum())
    assert made.scales(n)["replaced"] == 50 and made.scales(n)["text"] == 1


def test_draws_follow_the_generator_among_the_codes_of_the_modality() -> None:
    made = objective(rate=0.9)
    hidden = made.corrupt(batch(3000, 4), None, {"noise": 1.0})
    logits = torch.full((VOCABULARY.size,), 5.0)  # likelier are what may not be drawn
    share = torch.arange(1.0, CODES + 1)
    logits[TEXT.first : TEXT.stop] = share.log()
    *_, (_, shown) = run(made, [hidden], logits, lambda b: torch.zeros(b.ids.numel()))
    drawn = shown.ids[..., 0][hidden.weight > 0].long() - TEXT.first
    found = torch.bincount(drawn, minlength=CODES).float() / len(drawn)
    assert len(found) == CODES and len(drawn) > 9000
    torch.testing.assert_close(found, share / share.sum(), atol=0.012, rtol=0)


def test_both_logits_of_a_bernoulli_are_its_probabilities() -> None:
    told = Bernoulli(torch.tensor([-2.0, 0.0, 3.0]))
    each = torch.stack([told.log_prob(torch.full((3,), float(v))) for v in (0, 1)], -1)
    torch.testing.assert_close(told.logits.log_softmax(-1), each)
    assert told.sample(torch.Generator(), temperature=0).tolist() == [0, 0, 1]


def test_a_model_without_the_head_or_with_another_one_is_refused() -> None:
    made = objective()
    made.check_model(make(heads={"replaced": "binary"}))
    for heads in ({"tokens": "softmax"}, {"replaced": "binary", "tokens": "softmax"}):
        with pytest.raises(UserError, match="only head is 'replaced'"):
            made.check_model(make(heads=heads))
