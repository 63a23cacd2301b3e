"""Masked modelling: what is hidden, what predicts it, and stages with masks of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import token_shards
from model_toys import VOCABULARY, make
from torch import Tensor

from mm.batch import Batch
from mm.data.batching.collate import to_batch
from mm.errors import UserError
from mm.model.folder import read_config
from mm.objectives.masked import NOISE, Masked, MaskedConfig
from mm.run import Run
from mm.specs import Segment
from mm.trainer.loop import train
from mm.vocabulary import MASK

TEXT = VOCABULARY.range("text")


def document(n: int, seed: int, role: str = "target") -> list[Segment]:
    codes = np.random.default_rng(seed).integers(0, 11, n)
    return [Segment("text", codes, role=role)]


def masked(**settings: Any) -> Masked:
    return MaskedConfig(**settings).build(VOCABULARY)


def hidden(before: Batch, after: Batch) -> Tensor:
    """`(B, T)` bool: places that have a weight, as those of the codes themselves."""
    return after.weight > 0


LONG = to_batch([[document(4000, 1)], [document(4000, 2)]], VOCABULARY)
STEP = {NOISE: 5.0}


@pytest.mark.parametrize("shape", ["uniform", "span", "block"])
@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_the_share_is_hidden_in_the_shape_that_was_asked_for(shape: str, rate: float) -> None:
    b = masked(shape=shape, rate=rate, length=4.0).corrupt(LONG, None, STEP)
    off = hidden(LONG, b)
    assert abs(float(off.float().mean()) - rate) < 0.02
    ends = (off[:, 1:] != off[:, :-1]).sum(1).float().mean() / 2
    length = float(off.sum(1).float().mean() / ends)
    alone = 1 / (1 - rate)  # mean run of independent places
    if shape == "uniform":
        assert length == pytest.approx(alone, rel=0.1)
    elif shape == "span":  # runs that meet are longer than spans
        assert 3.2 < length < 4 * alone * 1.2
    else:
        inside = off[0, 4:4000].view(-1, 4)
        assert (inside.all(1) | ~inside.any(1)).all()


def test_hidden_codes_predict_themselves_and_nothing_else_costs_loss() -> None:
    given = [Segment("text", np.arange(5), role="condition"), *document(40, 3)]
    b = to_batch([[given]], VOCABULARY)
    after = masked(rate=0.5).corrupt(b, None, STEP)
    off = after.weight[0] > 0
    assert 10 < off.sum() < 30 and not off[:8].any(), "conditions are read"
    assert (after.ids[0, off, 0] == MASK).all()
    assert torch.equal(after.targets[0, off], b.ids[0, off])
    assert torch.equal(after.ids[0, ~off], b.ids[0, ~off])
    assert (after.labels["target_modality"][0, off] == TEXT.index).all()
    assert {*off.nonzero()[:, 0].tolist()} <= {*after.places["tokens"].tolist()}
    shifted = masked(rate=0.5, predicted_at="previous").corrupt(b, None, STEP)
    assert torch.equal(shifted.ids, after.ids) and torch.equal(shifted.targets, b.targets)
    assert torch.equal(shifted.weight[0, :-1] > 0, off[1:]), "the token before predicts"


def test_some_show_another_code_and_some_stay() -> None:
    b = masked(rate=0.5, random=0.1, kept=0.2).corrupt(LONG, None, STEP)
    off = hidden(LONG, b)
    shown, true = b.ids[..., 0][off], LONG.ids[..., 0][off]
    assert float((shown == MASK).float().mean()) == pytest.approx(0.7, abs=0.02)
    assert float((shown == true).float().mean()) == pytest.approx(0.2 + 0.1 / 11, abs=0.02)
    other = shown[(shown != MASK) & (shown != true)]
    assert {*other.tolist()} == {*range(TEXT.first, TEXT.stop)}


def test_further_streams_of_ids_stay_as_they_are() -> None:
    two = replace(LONG, ids=torch.cat((LONG.ids, LONG.ids + 1), -1))
    after = masked(rate=0.5).corrupt(two, None, STEP)
    assert torch.equal(after.ids[..., 1:], LONG.ids + 1)


def test_documents_draw_their_own_share() -> None:
    b = to_batch([[document(500, i)] for i in range(30)], VOCABULARY)
    share = hidden(b, masked(rate=0.2, max_rate=0.8).corrupt(b, None, STEP)).float().mean(1)
    assert share.min() < 0.35 and share.max() > 0.65 and abs(float(share.mean()) - 0.5) < 0.08


def test_what_is_hidden_depends_on_the_step_and_the_document_alone() -> None:
    docs, objective = [document(n, n) for n in (9, 30, 17)], masked(rate=0.4, shape="span")

    def by_document(rows: list[list[int]], noise: float) -> dict[int, list[int]]:
        b = to_batch([[docs[i] for i in row] for row in rows], VOCABULARY)
        ids = objective.corrupt(b, None, {NOISE: noise}).ids[..., 0]
        found, order = {}, [i for row in rows for i in row]
        for number, i in enumerate(order, 1):
            found[i] = ids[b.layout.fields.document == number].tolist()
        return found

    packed = by_document([[0, 1], [2]], 5)
    assert packed == by_document([[2, 0, 1]], 5) and packed != by_document([[2, 0, 1]], 6)


def test_a_model_that_cannot_read_both_ways_is_refused() -> None:
    mixers = {"m": {"kind": "memory_compressed", "heads": 2}}
    model = make(backbone={"kind": "stack", "pattern": "m", "mixers": mixers})
    with pytest.raises(UserError, match="cannot run under a full mask"):
        masked().check_model(model)
    masked().check_model(make())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"random": 0.7, "kept": 0.4}, "together more than 1"),
        ({"rate": 0.5, "max_rate": 0.2}, "smaller than objective.rate"),
        ({"mask": "causal | same_itm"}, "did you mean 'same_item'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said):
        masked(**settings)


def test_stages_take_turns_with_masks_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked modelling under a full mask, then next tokens, then hidden ones again."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    token_shards(tmp_path, 24)
    tokens = tmp_path / "tokens"
    data = {"kind": "packed", "sources": [{"path": tokens}], "seq_len": 128, "batch_size": 2}
    tasks = {"kind": "any_to_any", "tasks": {"text": 1.0}, "condition_dropout": 0.0}
    stage = {"data": data, "budget": {"steps": 3}, "eval_every": 0}
    hide = {"kind": "masked", "rate": 0.3, "transform": tasks}
    values = {
        "name": "turns",
        "out": tmp_path,
        "vocabulary": tokens / "vocabulary.json",
        "model": {"kind": "lm", "d_model": 32, "backbone": {"kind": "stack", "depth": 1}},
        "stages": [
            stage | {"objective": hide},
            stage | {"objective": {"kind": "next_token", "transform": tasks}},
            stage | {"objective": hide, "mask": "full"},
        ],
        "engine": {"precision": "fp32"},
        "checkpoints": {"every": 0},
    }
    run = Run.model_validate(values)
    assert train(run)["step"] == 9
    assert read_config(run.folder / "model")["mask"] == "full", "what the last stage leaves"
    values["name"], values["stages"][1]["mask"] = "ahead", "full"
    with pytest.raises(UserError, match="shows a target of"):
        train(Run.model_validate(values))
