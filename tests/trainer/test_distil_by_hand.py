"""Losses of a student beside its teacher by hand, with models whose answers are written down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical as Oracle
from torch.distributions import kl_divergence

from mm.batch import Batch
from mm.data.batching.collate import to_batch
from mm.errors import UserError
from mm.init_from import InitFrom
from mm.model.heads.softmax import Categorical
from mm.model.layer import HeadOut, ModelOut
from mm.objectives.objective import Network
from mm.registry import OBJECTIVES
from mm.specs import Segment, TokenSpec
from mm.vocabulary import extend_vocabulary

VOCABULARY = extend_vocabulary([TokenSpec("text", 6), TokenSpec("image", 4)])


def distil(**settings: Any) -> Any:
    return OBJECTIVES.parse({"kind": "distil"} | settings).build(VOCABULARY)


def batch() -> Batch:
    given = Segment("text", np.array([1, 2]), role="condition")
    rows = [[[given, Segment("image", np.array([0, 3, 1]))], [Segment("text", np.array([5]))]]]
    return to_batch(rows, VOCABULARY, 20)


def says(seed: int, hidden: dict[str, list[float]]) -> Any:
    """Drawn logits of every place; outputs of layers that are the same at all tokens."""
    g = torch.Generator().manual_seed(seed)
    every = torch.randn(20, VOCABULARY.size, generator=g, dtype=torch.float64).float()

    def net(b: Batch, **asked: Any) -> ModelOut:
        assert not asked["loss"] and asked["heads"] == ("tokens",)
        shown = {name: torch.tensor(hidden[name]).expand(1, 20, 2) for name in hidden}
        kept = {name: x for name, x in shown.items() if name in asked["return_intermediates"]}
        told = Categorical(every[b.places["tokens"].long()])
        return ModelOut(b.ids, {"tokens": HeadOut(None, told)}, None, kept, {})

    net.every = every  # type: ignore[attr-defined]
    return net


def test_a_student_pays_for_targets_distances_and_layers() -> None:
    student = says(1, {"hidden.0": [1.0, 0.0], "hidden.1": [1.0, 0.0]})
    teacher = says(2, {"hidden.2": [0.0, 2.0], "hidden.4": [3.0, 4.0]})
    objective = distil(
        temperature=2.0,
        alpha=0.25,
        hidden={"hidden.0": "hidden.2", "hidden.1": "hidden.4"},
        hidden_weight=3.0,
        balance="modalities",
    )
    b, nets = batch(), {"model": student, "teacher": teacher}
    env: Any = None
    found = list(objective.terms([b, b, b], nets, env))
    assert [(term.network, term.step) for term in found] == [
        ("model", False),
        ("model", False),
        ("model", True),
    ]
    # begin, 1, 2, end, begin, 0, 3, 1, end of an image that is told; begin, 5, end
    of = {"image": [4, 5, 6, 7], "text": [9, 10]}
    n = objective.counts(b)
    want: dict[str, Tensor] = {}
    for modality, at in of.items():
        s, t = (net.every[at] for net in (student, teacher))
        target = b.ids[0, [i + 1 for i in at], 0].long()
        want[modality] = F.cross_entropy(s, target, reduction="sum")
        far = kl_divergence(Oracle(logits=t / 2), Oracle(logits=s / 2))
        want[f"distil_{modality}"] = 4 * far.sum()
        assert n[modality] == n[f"distil_{modality}"] == len(at)
    want["hidden"] = torch.tensor(12 * (1 + 0.4) / 2)  # cosines 0 and 0.6 of 12 tokens
    assert n["hidden"] == 12
    assert found[0].losses.keys() == want.keys() == n.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[0].losses[name], value, msg=name)
    shares = {"image": 0.75, "text": 0.75, "distil_image": 0.25, "distil_text": 0.25}
    assert objective.scales(n) == shares | {"hidden": 3.0}
    assert objective.held_out(n) == ("text", "image")
    apart = {name: n[name] for name in objective.held_out(n)}
    assert objective.scales(apart) == {"text": 1.0, "image": 1.0}, "as of next_token"


def test_layers_of_other_widths_are_not_drawn_together() -> None:
    objective = distil(hidden={"hidden.0": "hidden.9"})
    nets = {"model": says(1, {"hidden.0": [1.0, 0.0]}), "teacher": says(2, {})}
    env: Any = None
    with pytest.raises(UserError, match=r"hidden\.0 of the model has width 2, .* teacher none"):
        list(objective.terms([batch()], nets, env))


def test_the_teacher_is_what_it_is_given_or_the_model_as_it_begins() -> None:
    given = InitFrom(path="runs/teacher")  # type: ignore[call-arg]
    own = distil(teacher=given).networks
    assert own == {"teacher": Network(None, "frozen", of=None, init_from=given)}
    follows = distil().networks
    assert follows == {"teacher": Network(None, "frozen", of="model", init_from=None)}
