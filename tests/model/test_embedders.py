"""Embedders against plain references, tied heads, States, slices of rows, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_toys import VOCABULARY, N, make
from torch import Tensor

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.embedders.base import sum_of_rows
from mm.model.embedders.hashed_ngrams import hash_ngrams
from mm.model.embedders.sum import SumEmbedder, SumEmbedderConfig
from mm.model.layer import init_weights
from mm.model.mixers.conv.state import TokenTail
from mm.model.model import Model
from mm.registry import EMBEDDERS
from mm.shard import Shard
from mm.state import State
from mm.surgery.base import Operated
from mm.surgery.extend_vocabulary import ExtendVocabulary
from mm.trainer.callbacks.machine import multiplied_weights

D = 16
TEXT, IMAGE = 1, 2  # numbers of modalities
SIZES, BUCKETS = (2, 3, 5), 13
# Of two rows: modalities of the tokens of each document. The second goes from text to an image.
ROWS = [[[TEXT] * 9, [TEXT] * 4 + [IMAGE] * 5], [[IMAGE] * 2, [0, TEXT, TEXT, TEXT, IMAGE]]]
DOCS = [modality for row in ROWS for modality in row]


def ids_of(document: int) -> list[int]:
    """Few ids, so that n-grams recur; one place without an id."""
    made = np.random.default_rng(document).integers(16, 20, len(DOCS[document])).tolist()
    return [*made[:3], -1, *made[4:]] if document == 1 else made


def call(pieces: list[list[tuple[int, int, int]]], pad: int = 0) -> Batch:
    """Rows of (document, start, stop); document i has slot i."""
    rows, ids = [], []
    for row in pieces:
        rows.append([
            Doc(b - a, modality=DOCS[d][a:b], slot=d, fresh=a == 0, start=a) for d, a, b in row
        ])  # fmt: skip
        ids.append([i for d, a, b in row for i in ids_of(d)[a:b]])
    T = max(map(len, ids)) + pad
    padded = [row + [17] * (T - len(row)) for row in ids]
    return Batch.of_ids(torch.tensor(padded), Layout.from_rows(rows, T))


PACKED = call([[(0, 0, 9), (1, 0, 9)], [(2, 0, 2), (3, 0, 5)]], pad=2)


def built(kind: str, more: int = 0, **settings: Any) -> Any:
    """Of the vocabulary's ids, and ``more`` behind them."""
    torch.manual_seed(0)
    embedder = EMBEDDERS.get(kind)(**settings).build(N + more, D, VOCABULARY)
    init_weights(embedder)
    return embedder.double()


def hashed() -> Any:
    return built("hashed_ngrams", sizes=SIZES, buckets=BUCKETS)


def run(embedder: Any, batch: Batch) -> Tensor:
    return embedder(batch.ids, Ctx(batch.layout, Causal(), batch.ids)).y


def by_document(y_BTD: Tensor) -> list[Tensor]:
    return [y_BTD[0, :9], y_BTD[0, 9:18], y_BTD[1, :2], y_BTD[1, 2:7]]


def test_hashed_ngrams_are_those_of_a_loop_over_documents() -> None:
    embedder = hashed()
    table, ngrams = embedder.weight.detach().numpy(), embedder.ngrams.detach().numpy()
    seen = 0
    for document, got in enumerate(by_document(run(embedder, PACKED))):
        ids, modality = ids_of(document), DOCS[document]
        for t, y in enumerate(got.detach().numpy()):
            wanted = table[ids[t]] * (ids[t] >= 0)
            for k, n in enumerate(SIZES):
                first = t - n + 1
                if first < 0 or min(ids[first : t + 1]) < 0:
                    continue
                if len(set(modality[first : t + 1])) > 1:
                    continue
                hashed_to = sum(ids[t - j] * 1_000_000_007**j for j in range(n)) % BUCKETS
                wanted = wanted + ngrams[k * BUCKETS + hashed_to]
                seen += 1
            np.testing.assert_allclose(y, wanted * math.sqrt(D) / (len(SIZES) + 1), atol=1e-12)
    assert seen > 15


def test_hashes_of_large_ids_and_tables_do_not_overflow() -> None:
    ids = [2**31 - 1 - i for i in range(8)]
    (index,), (there,) = hash_ngrams(torch.tensor([[ids]], dtype=torch.int32), (3, 8), 2**31 - 19)
    wanted = [sum(ids[j] * 1_000_000_007**j for j in range(n)) % (2**31 - 19) for n in (3, 8)]
    assert index[0].tolist() == wanted and there.all()


def test_hashed_ngrams_in_chunks_steps_and_drafts_are_those_of_training() -> None:
    embedder = hashed()
    wanted = by_document(run(embedder, PACKED))
    for longest in (1, 4):
        state, done = embedder.initial_state(4, 9), [0] * 4
        assert state.n_bytes() == embedder.state_bytes(4, 9)
        for draft in (False, True) * 9:
            pieces = [(d, n, min(n + longest, len(DOCS[d]))) for d, n in enumerate(done)]
            batch = call([pieces[2:], pieces[:2]])
            ctx = Ctx(batch.layout, Causal(), batch.ids, draft=draft)
            y, state, _, _ = embedder(batch.ids, ctx, state)
            for row, each in ((1, pieces[:2]), (0, pieces[2:])):
                at = 0
                for d, a, b in each:
                    torch.testing.assert_close(y[row, at : at + b - a], wanted[d][a:b])
                    at += b - a
            taken = [b - a - (draft and b - a > 1) for _, a, b in pieces]
            state = state.accept(torch.tensor(taken)) if draft else state
            done = [n + m for n, m in zip(done, taken, strict=True)]
        assert done == [len(d) for d in DOCS]


def test_hashed_ngrams_of_slices_of_rows_are_those_of_whole_rows() -> None:
    """Nothing is passed: every process has the ids of whole rows."""
    embedder, size = hashed(), 5
    whole = run(embedder, PACKED)
    got = []
    for rank in range(size):
        shard, own = Shard.of(PACKED.layout, rank, size)
        shard = replace(shard, ids=PACKED.ids)
        got.append(embedder(shard.slice(PACKED.ids), Ctx(own, Causal(), shard=shard)).y)
    torch.testing.assert_close(torch.cat(got, 1), whole)


class Shifted(SumEmbedder):
    """A row and half of the one before it: a State that no cache cuts."""

    def __init__(self) -> None:
        super().__init__(N, D, SumEmbedderConfig())
        self.tail = TokenTail(D, 1)

    def vectors(
        self, ids_BTS: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        (own, before), after = self.tail(sum_of_rows(self.weight, ids_BTS, 1.0), ctx, state)
        return own + 0.5 * before, after


@pytest.mark.parametrize("stateful", ["replayed", "cut"])
def test_a_model_keeps_the_state_of_its_embedder(stateful: str) -> None:
    """Slots move, drafts are accepted in part, bytes are as declared."""
    model = make(embedder={"kind": "hashed_ngrams", "sizes": [2, 4], "buckets": 11})
    if stateful == "replayed":
        model.embedder = Shifted()
        init_weights(model)
    model.double().eval()
    with torch.no_grad():
        wanted = by_document(model(PACKED, heads=()).hidden)
        state = model.initial_state(4, 9)
        assert state.n_bytes() == model.state_bytes(4, 9) > model.backbone.state_bytes(4, 9)
        model(call([[(3, 0, 5)], [(1, 0, 9)]]), state=state.fork(), heads=())
        out = model(call([[(0, 0, 3), (1, 0, 5)], [(3, 0, 4)]]), state=state, draft=True, heads=())
        state = out.state.accept(torch.tensor([2, 5, 0, 3]))
        # Slot 1 leaves, joins again as the last one, and all go on.
        order = torch.tensor([0, 3, 2, 1])
        state = state.select(order[:2]).cat(state.select(order[2:])).select(order)
        out = model(call([[(0, 2, 9), (2, 0, 2)], [(1, 5, 9), (3, 3, 5)]]), state=state, heads=())
    got = out.hidden
    for d, a, y in (
        (0, 2, got[0, :7]),
        (2, 0, got[0, 7:9]),
        (1, 5, got[1, :4]),
        (3, 3, got[1, 4:]),
    ):
        torch.testing.assert_close(y[: len(DOCS[d]) - a], wanted[d][a:])


def test_factorized_is_the_product_of_its_matrices() -> None:
    embedder = built("factorized", rank=3)
    rows = (embedder.weight @ embedder.projection).detach()
    ids = PACKED.ids[..., 0]
    wanted = rows[ids.clamp_min(0).long()] * (ids >= 0)[..., None] * math.sqrt(D)
    torch.testing.assert_close(run(embedder, PACKED), wanted)
    config: Any = EMBEDDERS.get("factorized")
    wide = config(rank=64).build(4096, 256)
    init_weights(wide)
    assert (wide.weight @ wide.projection).std().item() == pytest.approx(256**-0.5, rel=0.05)


@pytest.mark.parametrize("kind", ["softmax", "multi_token", "parallel"])
def test_a_tied_head_reads_the_factors(kind: str, tmp_path: Path) -> None:
    """Logits are those of the product as one table; both Parameters are shared, saved once."""
    head = {"kind": kind, "tied": True}
    settings: dict[str, Any] = {"embedder": {"kind": "factorized", "rank": 3}}
    settings["heads"] = {"tokens": {"kind": "softmax", "tied": True}, "codes": head}
    model: Any = make(**settings).double().eval()
    at = model.heads["codes"]
    assert at.weight is model.embedder.weight and at.projection is model.embedder.projection
    out = model(PACKED, loss=False)
    table = model.embedder.weight @ model.embedder.projection
    wanted = out.hidden.flatten(0, 1) @ table.T
    got = out.heads["codes"].dist.logits
    seen = got.isfinite()
    torch.testing.assert_close(got[seen], wanted[seen])
    nll = model(PACKED).heads["tokens"].nll
    ids = PACKED.targets.flatten().clamp_min(0).long()
    torch.testing.assert_close(
        nll.double(), -wanted.log_softmax(-1).gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=1e-5
    )
    model.save_pretrained(tmp_path / "saved")
    loaded = Model.from_pretrained(tmp_path / "saved")
    assert loaded.heads["codes"].projection is loaded.embedder.projection


def test_by_modality_is_a_loop_over_ids() -> None:
    embedder = built("by_modality", more=2, width=5, widths={"image": 3})
    with torch.no_grad():
        own = [embedder.control, *embedder.tables.values()]
        for i, table in enumerate(own):
            table.gain.fill_(1.0 + i)
    tables = [(t.weight, t.projection, t.gain.item()) for t in own]
    assert [tuple(w.shape) for w, _, _ in tables] == [(18, D), (13, 5), (9, 3), (12, 5)]
    every = torch.arange(N + 2)[None, :, None].repeat(1, 1, 2)
    every[0, :, 1] = every[0, :, 1].flip(0)
    every[0, 0, 1] = -1
    got = run(embedder, Batch.of_ids(every))[0]
    starts = [0, *(VOCABULARY.range(m).begin for m in VOCABULARY.modalities)]
    for t, pair in enumerate(every[0].tolist()):
        wanted = torch.zeros(D, dtype=torch.float64)
        for i in (i for i in pair if i >= 0):
            m = int(VOCABULARY.modality_of(np.array([i]))[0])
            weight, projection, gain = tables[m]
            row = weight[i - starts[m] if i < N else i - N + 16]
            wanted = wanted + gain * math.sqrt(D) * (
                row if projection is None else row @ projection
            )
        torch.testing.assert_close(got[t], wanted)


def test_every_table_of_a_modality_has_a_gradient_in_every_step() -> None:
    """A batch without images: else ZeRO waits for a rank that has some."""
    embedder = built("by_modality", width=5)
    ids = torch.full((1, 4, 1), VOCABULARY.range("text").first)
    run(embedder, Batch.of_ids(ids)).sum().backward()
    grads = {name: p.grad for name, p in embedder.named_parameters()}
    assert all(g is not None for g in grads.values()), grads.keys()
    assert grads["tables.text_ids.weight"].any()
    assert not grads["tables.image_ids.weight"].any()


def test_what_does_not_fit_is_refused_by_name() -> None:
    tied = {"tokens": {"kind": "softmax", "tied": True}}
    with pytest.raises(UserError, match="by_modality has no one table .* set heads.*tied=false"):
        make(embedder="by_modality", heads=tied)
    with pytest.raises(UserError, match="widths: .* no modality 'imge'; did you mean 'image'"):
        make(embedder={"kind": "by_modality", "widths": {"imge": 3}})


@pytest.mark.parametrize("kind", [*EMBEDDERS])
def test_codes_seed_rows_and_a_longer_vocabulary_keeps_them(kind: str) -> None:
    model = make(embedder=EMBEDDERS.get(kind).smallest().to_dict())
    vectors = np.random.default_rng(0).standard_normal((7, 12)).astype(np.float32)
    vectors[3] = vectors[2]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.config.prepare(model, {"image": vectors})
    codes = VOCABULARY.range("image")
    alike = torch.arange(codes.first + 2, codes.first + 4)[:, None]
    y = run(model.embedder, Batch.of_ids(alike))[:, 0].detach()
    assert torch.corrcoef(y)[0, 1] > 0.8
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert len(moved) == 1
    whole = sum(p.numel() for p in model.parameters())
    looked_up = sum(model.embedder.get_parameter(n).numel() for n in model.embedder.looked_up)
    assert multiplied_weights(model) == whole - looked_up

    longer = VOCABULARY.add(VOCABULARY.ranges[0]._replace(modality="values"))
    old = Operated(model.config, dict(model.state_dict()), VOCABULARY)
    grown = ExtendVocabulary().apply(old, longer)
    fresh = model.config.build(longer)
    left = fresh.load_state_dict(grown.tensors, strict=False)
    assert not left.unexpected_keys
    assert all(n.startswith("embedder.tables.values_ids.") for n in left.missing_keys), (
        left.missing_keys
    )
    same = Ctx(PACKED.layout, Causal())
    torch.testing.assert_close(
        fresh.embedder(PACKED.ids, same).y, model.embedder(PACKED.ids, same).y
    )


@pytest.mark.parametrize("kind", [*EMBEDDERS])
def test_the_width_sets_the_rate_of_what_grows_with_it(kind: str) -> None:
    """muP finds by name what a model of twice the width has wider."""
    settings = {"embedder": EMBEDDERS.get(kind).smallest().to_dict(), "mup_base": 4}
    small, large = (make(**settings, d_model=d).embedder for d in (16, 32))
    grown = dict(large.named_parameters())
    grows = {n for n, p in small.named_parameters() if p.shape != grown[n].shape}
    rates = make(**settings).rates()
    assert grows and grows == {*small.wide_parameters}
    for name, _ in small.named_parameters():
        assert rates[f"embedder.{name}"] == (0.5 if name in grows else 1.0), name
