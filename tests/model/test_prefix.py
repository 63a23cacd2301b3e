"""Prefix language models: conditions are read both ways, in training and generation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import token_shards
from generation_toys import VOCABULARY
from laws import ROOT
from torch import Tensor

from mm.data.batching.collate import to_batch
from mm.data.batching.document import document_tokens
from mm.data.streams.shuffle import generator
from mm.data.transforms.any_to_any import AnyToAnyConfig
from mm.data.transforms.mask_conditions import MaskConditionsConfig
from mm.decoders.generate import generate_tokens
from mm.decoders.prompts import Stream, batch, prepare
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.objectives.next_token import NextTokenConfig
from mm.registry import NETWORKS
from mm.run import Run
from mm.specs import Segment
from mm.trainer.log import metrics
from mm.trainer.loop import train
from mm.vocabulary import MASK, NULL

TEXT, IMAGE = VOCABULARY.range("text"), VOCABULARY.range("image")
PICTURE = Segment("image", np.array([1, 2, 3, 4, 5, 6]), role="condition")


def text(*ids: int, role: str = "target", **settings: Any) -> Segment:
    return Segment("text", np.array(ids), role=role, **settings)


def model(pattern: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    mixers = {"local": {"kind": "attention", "window": 3}}
    backbone = {"kind": "stack", "pattern": pattern, "mixers": mixers}
    config = {"kind": "lm", "d_model": 16, "mask": "prefix", "backbone": backbone}
    made = NETWORKS.parse(config).build(VOCABULARY)
    init_weights(made)
    return made.double().eval()


def test_leading_conditions_are_the_prefix() -> None:
    given = [PICTURE, text(3, role="condition"), text(4, 5), PICTURE, text(6)]
    d = document_tokens(given, VOCABULARY)
    assert d.prefix.tolist() == [1] * 11 + [0] * (len(d.ids) - 11)
    null = [Segment("image", None, role="condition"), text(1)]
    layout = to_batch([[given, null], [[text(1, 2)]]], VOCABULARY).layout
    marked = layout.fields.extra["prefix"]
    assert marked.sum(1).tolist() == [12, 0] and marked[0, len(d.ids)] == 1
    ids = np.array([*d.ids[:11], TEXT.begin, TEXT.first], np.int32)
    asked = batch([Stream(ids, opening=11)], VOCABULARY)
    assert asked.layout.fields.extra["prefix"].tolist() == [[1] * 11 + [0, 0]]


def test_hidden_codes_of_a_condition_predict_themselves() -> None:
    fields = {"masked": np.array([0, 1, 0, 0, 0, 1], bool)}
    b = to_batch([[[PICTURE._replace(fields=fields), text(7)]]], VOCABULARY)
    d = document_tokens([PICTURE, text(7)], VOCABULARY)
    hidden = [2, 6]
    assert b.ids[0, hidden, 0].tolist() == [MASK] * 2
    assert b.targets[0, hidden, 0].tolist() == [IMAGE.first + 2, IMAGE.first + 6]
    assert b.places["tokens"].tolist() == [2, 6, 8, 9]
    others = [i for i in range(len(d.ids)) if i not in hidden]
    assert b.ids[0, others, 0].tolist() == d.ids[others].tolist()
    assert b.targets[0, others, 0].tolist() == d.targets[others].tolist()
    assert [len(v[0]) for v in b.layout.grids.values()] == [6], "a grid with hidden cells is whole"
    objective = NextTokenConfig(masked=0.25).build(VOCABULARY)
    counts = {k: float(v) for k, v in objective.counts(b).items() if v}
    assert counts == {"text": 2, "masked": 2}
    scales = objective.scales(objective.counts(b))
    assert float(scales["text"]) == 1 and float(scales["masked"]) == 0.25, "means, then weights"
    assert NextTokenConfig().build(VOCABULARY).counts(b)["image"] == 2
    with pytest.raises(ValueError, match="can be masked"):
        document_tokens([text(1, fields={"masked": np.array([True])})], VOCABULARY)


def test_masking_hides_its_share_of_conditions_alone() -> None:
    transform = MaskConditionsConfig(rate=0.3).build()
    long = Segment("text", np.arange(20).repeat(100), role="condition")
    null = Segment("image", None, role="condition")
    one, same, target = transform([long, null, text(1)], generator(0)) or []
    assert same is null and not target.fields and abs(one.fields["masked"].mean() - 0.3) < 0.04
    again = transform([long, null, text(1)], generator(1)) or []
    assert (again[0].fields["masked"] != one.fields["masked"]).any()


def test_conditions_are_repeated_alike_in_training_and_generation() -> None:
    task = AnyToAnyConfig(tasks={"image>text": 1}, condition_dropout=0, repeats=2).build()
    segments = task([PICTURE._replace(role="target"), text(4)], generator(0)) or []
    assert [s.modality for s in segments] == ["image", "image", "text"]
    trained = document_tokens(segments, VOCABULARY).ids
    asked = prepare([PICTURE], "text", VOCABULARY, 5, "prompt", repeats=2)
    assert asked.tokens.ids.tolist() == trained[:17].tolist()
    assert asked.null.ids.tolist() == [NULL, NULL, TEXT.begin], "as dropped conditions"
    net = model("rg_lru")
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
    spans = generate_tokens(net, VOCABULARY, [[PICTURE]], "text", repeats=2, **settings)
    written = generate_tokens(net, VOCABULARY, [[PICTURE, PICTURE]], "text", **settings)
    assert spans[0].tolist() == written[0].tolist()
    with pytest.raises(UserError, match="repeats"):
        generate_tokens(net, VOCABULARY, [[PICTURE]], "text", repeats=0)


@pytest.mark.parametrize("pattern", ["attention local", "madeon attention", "jrt local"])
def test_generation_reads_the_prefix_as_training_does(pattern: str) -> None:
    """With a prefix: packed training rows = alone = a prefill in one piece, then steps."""
    net = model(pattern)
    documents = [
        [PICTURE, text(3, 4, 5)],
        [text(9, 8, role="condition"), text(1)],
        [text(2, 7, 6)],
        [text(5, 5, 6, role="condition"), PICTURE, text(3)],
    ]
    packed = to_batch([documents[:2], documents[2:]], VOCABULARY)
    whole = net(packed, heads=()).hidden
    starts = packed.layout.cu_seqlens.tolist()
    for document, at in zip(documents, starts, strict=False):
        d = document_tokens(document, VOCABULARY)
        expected = whole.flatten(0, 1)[at : at + len(d.ids)]
        alone = net(to_batch([[document]], VOCABULARY), heads=()).hidden[0]
        torch.testing.assert_close(alone, expected)
        # What generation does: the prefix and the opening in one call, then token by token.
        begin = len(d.ids) - len(document[-1].ids) - 2
        first = batch([Stream(d.ids[: begin + 1], opening=begin)], VOCABULARY)
        out = net(first, state=net.initial_state(1, 32), heads=())
        torch.testing.assert_close(out.hidden[0], expected[: begin + 1])
    prompt = [Segment("text", np.array([5, 5, 6]), role="condition"), PICTURE]
    (span,) = generate_tokens(net, VOCABULARY, [prompt], "text", temperature=0, max_tokens=6)
    trained = replace(to_batch([[[*prompt, text(*span)]]], VOCABULARY), places={})
    logits = net(trained, loss=False).heads["tokens"].dist.logits[13 : 13 + len(span)]
    assert logits[:, TEXT.first : TEXT.stop].argmax(-1).tolist() == span.tolist()


def moved(net: Any, b: Any, place: int) -> Tensor:
    """Which places of row 0 depend on the token at ``place``."""
    other = b.ids.clone()
    other[0, place] = TEXT.first + 11
    difference = net(b, heads=()).hidden - net(replace(b, ids=other), heads=()).hidden
    return difference[0].abs().sum(-1) > 1e-9


@pytest.mark.parametrize("pattern", ["attention", "madeon", "jrt"])
def test_the_prefix_sees_all_of_itself_and_the_rest_its_past(pattern: str) -> None:
    net = model(pattern)
    b = to_batch([[[text(3, 4, 5, role="condition"), text(6, 7)], [text(1, 2)]]], VOCABULARY)
    assert moved(net, b, 3).tolist() == [True] * 9 + [False] * 4
    assert moved(net, b, 6).tolist() == [False] * 6 + [True] * 3 + [False] * 4


def test_a_model_without_a_prefix_mask_does_not_see_the_field() -> None:
    torch.manual_seed(0)
    net = NETWORKS.parse({"kind": "lm", "d_model": 16}).build(VOCABULARY)
    init_weights(net)
    b = batch([Stream(document_tokens([PICTURE], VOCABULARY).ids)], VOCABULARY)
    out = net(b, state=net.initial_state(1, 16))
    assert b.layout.fields.extra and not out.state.parts[0].parts[0].fields.extra


@pytest.mark.parametrize("name", [pytest.param("prefix", marks=pytest.mark.slow), "jrt"])
def test_the_shipped_runs_train(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    token_shards(tmp_path, 24)
    tokens = tmp_path / "tokens"
    changes = [
        f"out={tmp_path}",
        f"vocabulary={tokens}/vocabulary.json",
        "tokenizers={}",
        "callbacks=[]",
        "checkpoints.every=0",
        "engine.precision=fp32",
        "model.d_model=32",
        "model.backbone.depth=2",
        f"stages.0.data.sources=[{{path: {tokens}}}]",
        "stages.0.data.seq_len=128",
        "stages.0.tasks=[]",
        "stages.0.budget.steps=12",
        "stages.0.schedule.warmup=2",
    ]
    run = Run.load(ROOT / f"configs/quickstart/{name}.yaml", changes)
    assert run.model.mask == "prefix"  # type: ignore[attr-defined]
    train(run)
    rows = metrics.read(run.folder / "metrics.jsonl")
    assert len(rows) == 12 and rows[-1]["loss/total"] < 0.85 * rows[0]["loss/total"]
    assert ("loss/masked" in rows[0]) == (name == "jrt")
    if name == "jrt":
        assert rows[-1]["loss/masked"] < rows[0]["loss/masked"]


def test_a_stream_that_cuts_documents_is_refused(tmp_path: Path) -> None:
    data = {"kind": "stateful", "source": {"path": tmp_path}}
    values = {
        "name": "x",
        "model": {"kind": "lm", "mask": "prefix"},
        "stages": [{"data": data, "objective": "next_token"}],
    }
    with pytest.raises(ValueError, match="prefix is read in one piece"):
        Run.model_validate(values)
