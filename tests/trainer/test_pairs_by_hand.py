"""Losses of pairs by hand: two modalities of a sample, two answers to a prompt."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.batch import Batch
from mm.data.batching.collate import to_batch
from mm.layout import Doc, Layout
from mm.objectives.dpo import DpoConfig, _answers
from mm.registry import OBJECTIVES
from mm.specs import Segment, TokenSpec
from mm.trainer.env import TrainerEnv
from mm.vocabulary import extend_vocabulary

VOCABULARY = extend_vocabulary([TokenSpec("text", 6), TokenSpec("image", 4), TokenSpec("audio", 3)])
ENV: Any = TrainerEnv(0, torch.device("cpu"), "fp32")


def span(modality: str, *codes: int) -> Segment:
    return Segment(modality, np.array(codes))


def contrastive() -> Any:
    return OBJECTIVES.parse({"kind": "contrastive", "pair": ["image", "text"]}).build(VOCABULARY)


def test_each_of_the_pair_becomes_a_document_and_the_rest_padding() -> None:
    rows = [
        [[span("image", 1, 2), span("audio", 1), span("text", 3)]],
        [[span("text", 3, 1), span("image", 1, 2)], [span("text", 3)]],
    ]
    objective = contrastive()
    b = objective.corrupt(to_batch(rows, VOCABULARY), None, {})
    assert b.layout.fields.document.tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 0],
        [3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5],
    ]
    assert b.places["embedding"][:4].tolist() == [3, 9, 18, 14], "the image's before the text's"
    assert objective.counts(b) == {"contrastive": 2}, "the third sample has no image"


def of_ids(table: Tensor) -> Any:
    """A model whose vector of a document is the sum of those of its ids."""

    def net(b: Batch, heads: Any, loss: bool) -> Any:
        document = b.layout.fields.document.flatten().long()
        size = (len(b.layout.slot) + 1, table.shape[1])
        sums = table.new_zeros(size).index_add(0, document, table[b.ids.flatten().long()])
        mean = sums[document[b.places["embedding"]]]
        return SimpleNamespace(
            heads={"embedding": SimpleNamespace(dist=SimpleNamespace(mean=mean))}
        )

    return net


def test_micro_batches_learn_as_one_cross_entropy_of_all_pairs() -> None:
    """The second micro-batch has one pair, and a sample that lacks its text."""
    pairs = [((1, 2), (3,)), ((0,), (5, 1)), ((3, 1), (2,))]
    samples = [[span("image", *one), span("text", *two)] for one, two in pairs]
    micros = [[samples[:2]], [[samples[2], samples[1][:1]]]]
    objective = contrastive()
    table = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batches = [objective.corrupt(to_batch(rows, VOCABULARY), None, {}) for rows in micros]
    found = list(objective.terms(batches, {"model": of_ids(table)}, ENV))
    assert [term.step for term in found] == [False, True]
    loss = torch.stack([term.losses["contrastive"] for term in found]).sum()
    (got,) = torch.autograd.grad(loss, table)

    def vectors(modality: str, texts: list[tuple[int, ...]]) -> Tensor:
        r = VOCABULARY.range(modality)
        every = [[r.begin, *(r.first + code for code in codes), r.end] for codes in texts]
        return torch.stack([table[ids].sum(0) for ids in every])

    logits = vectors("image", [one for one, _ in pairs]) @ vectors("text", [t for _, t in pairs]).T
    own = torch.arange(3)
    both = [F.cross_entropy(scores, own, reduction="sum") for scores in (logits, logits.T)]
    want = (both[0] + both[1]) / 2
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, torch.autograd.grad(want, table)[0])
    with torch.no_grad():
        held_out = list(objective.terms(batches, {"model": of_ids(table)}, ENV))
    held_out = torch.stack([term.losses["contrastive"] for term in held_out]).sum()
    torch.testing.assert_close(held_out, want.detach())


def row(lengths: list[int], targets: list[int]) -> Batch:
    """One row of documents, and padding behind them."""
    T = len(targets)
    b = Batch.of_ids(torch.zeros(1, T), Layout.from_rows([[Doc(n) for n in lengths]], T))
    return replace(b, targets=torch.tensor(targets, dtype=torch.int32).view(1, T, 1))


@pytest.fixture
def answers() -> Batch:
    """Two prompts; the rejected answers are of two tokens more and of as many."""
    preferred = row([3, 2], [4, 5, -1, 0, -1, -1])
    preferred = replace(preferred, weight=torch.tensor([[0.0, 0.5, 0.0, 2.0, 0.0, 0.0]]))
    return replace(preferred, parts={"rejected": row([4, 2], [4, 6, 7, -1, 3, -1, -1])})


def costs(*by_target: float) -> Any:
    """A model to which a target costs the same everywhere; of no target it also says something."""
    table = torch.tensor(by_target)

    def net(b: Batch, heads: Any) -> Any:
        nll = table[b.targets.flatten().long().clamp_min(0)]
        return SimpleNamespace(heads={"tokens": SimpleNamespace(nll=nll)})

    return net


NETS = {"model": costs(1, 9, 9, 3, 2, 0.5, 4, 1), "reference": costs(1, 1, 1, 4, 1, 1, 1, 1)}


def test_margins_of_preferences_by_hand(answers: Batch) -> None:
    """Gains are -0.5 and 0 of the preferred answers, -4 and 1 of the rejected ones."""
    objective = DpoConfig(loss="hinge", beta=0.25, nll=0.1).build()
    found = list(objective.terms([answers] * 3, NETS, ENV))
    assert [term.step for term in found] == [False, False, True]
    losses = {name: float(value) for name, value in found[0].losses.items()}
    # hinges 1 - 3.5 / 4 and 1 + 1 / 4; costs 0.5 and 1 by their weights
    assert losses == {"dpo": 1.375, "accuracy": 1.0, "margin": 2.5, "nll": 2.25}
    assert objective.counts(answers) == {"dpo": 2, "accuracy": 2, "margin": 2, "nll": 2.5}


def test_answers_begin_where_the_preferred_one_has_a_weight(answers: Batch) -> None:
    """The least of ids is a target like others, and padding is of no answer."""
    one, two = _answers(answers, answers.parts["rejected"])
    assert one.nonzero().flatten().tolist() == [1, 3]
    assert two.nonzero().flatten().tolist() == [1, 2, 4]
