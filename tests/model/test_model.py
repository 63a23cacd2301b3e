"""The model: its one door, its parts, its folder, and the pattern language."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_toys import N, ids, make
from torch import Tensor

from mm.batch import Batch, Values
from mm.layout import Doc, Layout
from mm.mask import Causal, Full, Prefix, Window
from mm.model import length_buckets
from mm.model.context import Ctx
from mm.model.heads.softmax import Categorical
from mm.model.layer import init_weights
from mm.model.length_buckets import LengthBuckets
from mm.registry import MIXERS

# ---- forward ----


def test_loss_is_the_nll_of_the_targets_at_the_places() -> None:
    model, x = make(), ids(2, 6)
    targets, places = ids(2, 6, seed=1), torch.tensor([0, 3, 7, 11], dtype=torch.int32)
    batch = replace(Batch.of_ids(x), targets=targets[..., None].int(), places={"tokens": places})
    nll = model(batch).heads["tokens"].nll
    dist = model(batch, loss=False).heads["tokens"].dist
    assert nll.shape == (4,) and nll.dtype == torch.float32 and dist.logits.shape == (4, N)
    torch.testing.assert_close(nll, -dist.log_prob(targets.flatten()[places.long()]))
    assert model(batch, heads=()).heads == {}


def test_places_without_a_target_are_harmless_and_no_places_give_an_empty_loss() -> None:
    model = make()
    everywhere = model(Batch.of_ids(ids(2, 5))).heads["tokens"].nll
    assert everywhere.shape == (10,) and everywhere.isfinite().all()
    empty = replace(Batch.of_ids(ids(2, 5)), places={"tokens": torch.zeros(0, dtype=torch.int32)})
    nll = model(empty).heads["tokens"].nll
    assert nll.shape == (0,)
    nll.sum().backward()
    assert all(p.grad is not None for p in model.parameters()), (
        "every rank must run every module: ZeRO-3 waits for it"
    )


def test_streams_of_a_place_are_summed_and_minus_one_adds_nothing() -> None:
    model, x = make(), ids(1, 4)
    one = model(
        Batch.of_ids(x[..., None]), return_intermediates=frozenset({"hidden.0"})
    ).intermediates["hidden.0"]
    padded = model(
        Batch.of_ids(torch.stack((x, torch.full_like(x, -1)), -1)),
        return_intermediates=frozenset({"hidden.0"}),
    ).intermediates["hidden.0"]
    twice = model(
        Batch.of_ids(torch.stack((x, x), -1)), return_intermediates=frozenset({"hidden.0"})
    ).intermediates["hidden.0"]
    torch.testing.assert_close(padded, one)
    torch.testing.assert_close(twice, 2 * one)
    torch.testing.assert_close(one[0, 0], model.embedder.weight[x[0, 0]] * 4.0)  # sqrt(16)


def test_taps_are_given_only_when_asked_for() -> None:
    model, batch = make(), Batch.of_ids(ids(1, 4))
    assert model(batch).intermediates == {}
    out = model(batch, return_intermediates=frozenset({"hidden.0", "hidden.1", "hidden"}))
    assert set(out.intermediates) == {"hidden.0", "hidden.1", "hidden"}
    assert torch.equal(out.intermediates["hidden"], out.hidden)
    early = make(
        heads={"tokens": {"kind": "softmax"}, "early": {"kind": "softmax", "reads": "hidden.1"}}
    )
    out = early(batch, loss=False)
    assert out.intermediates == {}
    read = early(batch, return_intermediates=frozenset({"hidden.1"})).intermediates["hidden.1"]
    torch.testing.assert_close(
        out.heads["early"].dist.logits, read[0] @ early.heads["early"].weight.T
    )


def test_path_runs_other_layers_in_order() -> None:
    model, batch = make(), Batch.of_ids(ids(1, 4))
    layers = model.backbone.layers
    first = model(batch, return_intermediates=frozenset({"hidden.1"})).intermediates["hidden.1"]
    torch.testing.assert_close(model(batch, path=[0]).hidden, model.backbone.norm(first))
    assert not torch.allclose(model(batch, path=[1, 0]).hidden, model(batch).hidden)
    assert len(layers) == 2 and len(model.initial_state(1, 4, path=[0, 0, 1])) == 3
    with pytest.raises(ValueError, match="3 parts"):
        model(batch, path=[0, 0, 1], state=model.initial_state(1, 4))


def test_masks_are_what_they_say() -> None:
    """A place moves exactly those outputs that the mask lets see it."""
    model, x = (
        make(
            backbone={
                "kind": "stack",
                "pattern": "attention",
                "mixers": {"attention": {"heads": 2}},
            }
        ),
        ids(1, 6),
    )
    prefix = torch.tensor([[1, 1, 1, 0, 0, 0]], dtype=torch.int32)
    layout = Layout.plain(1, 6)
    layout = replace(layout, fields=layout.fields._replace(extra={"prefix": prefix}))
    with torch.no_grad():
        for mask in (Causal(), Full(), Window(2), Prefix(), Causal() & ~Window(3) | Window(1)):
            before = model(Batch.of_ids(x, layout), mask=mask).hidden
            for s in range(6):
                y = x.clone()
                y[0, s] = (y[0, s] + 1) % N
                moved = (model(Batch.of_ids(y, layout), mask=mask).hidden - before).abs().sum(-1)[
                    0
                ] > 0
                f = layout.fields
                sees = mask.dense(f, f)[0, :, s].clone()
                sees[s] = True  # the residual stream
                assert torch.equal(moved, sees), (mask, s)


def test_grouping_by_length_covers_every_place_once() -> None:
    layout = Layout.from_rows([[Doc(3), Doc(40)], [Doc(20), Doc(1), Doc(5)]], 50)
    groups = LengthBuckets.of(layout, Causal())
    assert len(groups.groups) == 3 and all(
        g.mask.causal and not g.mask.is_set() for g in groups.groups
    )
    x = torch.arange(100.0, requires_grad=True)
    y = groups.join([part[0] for _, part in groups.split(x.view(2, 50, 1))], 2, 50)
    expected = x.view(2, 50, 1) * (layout.fields.document > 0)[..., None]
    assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad((y * torch.arange(100.0).view(2, 50, 1)).sum(), x)
    assert torch.equal(grad, torch.arange(100.0) * (layout.fields.document.flatten() > 0))
    shuffled = layout.fields.position.flip(1)
    reversed_time = replace(layout, fields=layout.fields._replace(position=shuffled))
    assert not any(g.mask.causal for g in LengthBuckets.of(reversed_time, Causal()).groups), (
        "times that do not rise need a real mask"
    )


def test_long_documents_are_taken_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.from_rows([[Doc(130), Doc(130), Doc(200)], [Doc(300)]], 480)
    groups = LengthBuckets.of(layout, Causal(), in_place=True)
    assert [(g.rows, g.length) for g in groups.groups] == [(2, 130), (1, 200), (1, 300)]
    assert groups.runs == ((0, 260), (260, 460), (480, 780)) and groups.index is None
    layer = MIXERS.get("attention")(heads=2, window=150).build(8)
    init_weights(layer)
    x = torch.randn(2, 480, 8)
    x[layout.fields.document == 0] = 1e3

    def run(at_least: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(length_buckets, "MIN_TOKENS_IN_PLACE", at_least)
        x.requires_grad_()
        y = layer(x, Ctx(layout, Causal())).y[layout.fields.document > 0]
        return y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    for lying, gathered in zip(run(128), run(10**6), strict=True):
        torch.testing.assert_close(lying, gathered, rtol=1e-4, atol=1e-5)


def test_a_document_that_outgrows_its_state_is_an_error() -> None:
    model = make()
    with torch.no_grad():
        state = model(
            Batch.of_ids(ids(1, 4), Layout.from_rows([[Doc(4, slot=0)]])),
            state=model.initial_state(1, 5),
        ).state
        with pytest.raises(ValueError, match="larger max_len"):
            model(
                Batch.of_ids(ids(1, 2), Layout.from_rows([[Doc(2, slot=0, fresh=False, start=4)]])),
                state=state,
            )


# ---- adapters ----


def test_values_fill_their_places_and_unfilled_places_become_padding() -> None:
    """Four reserved places of which the item fills two.

    As if the document had been shorter, wherever the hole is.
    """
    model = make(adapters={"image": {"kind": "linear", "d_in": 3}}).double()
    data = torch.randn(1, 2, 3, dtype=torch.float64)
    number = lambda *n: torch.tensor(n, dtype=torch.int32)

    def run(room: int) -> Tensor:
        text = ids(1, 5)
        x = torch.cat((text[:, :2], torch.full((1, room), -1), text[:, 2:]), 1)
        position = np.array([0, 1, *range(2, 2 + room), 9, 10, 11])[:, None]
        layout = Layout.from_rows([[Doc(5 + room, position=position), Doc(2)]], 5 + room + 2)
        batch = Batch.of_ids(torch.cat((x, ids(1, 2, seed=3)), 1), layout)
        values = Values(data, number(2), number(2), number(room))
        return model(replace(batch, values={"image": values})).hidden[0]

    exact, loose = run(2), run(4)
    torch.testing.assert_close(torch.cat((loose[:4], loose[6:])), exact)
    short = run(
        1
    )  # the second feature vector has no room: it goes nowhere, not into the next place
    torch.testing.assert_close(short[:3], exact[:3])
    assert not torch.allclose(short[3], exact[4])


def test_a_batch_without_the_modality_runs_its_adapter_on_a_zero_item() -> None:
    model = make(adapters={"image": {"kind": "linear", "d_in": 3}})
    layout = Layout.from_rows([[Doc(3), Doc(2)], [Doc(4)]], 6)
    batch = Batch.of_ids(ids(2, 6), layout)
    plain = make()
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("adapters")}
    )
    torch.testing.assert_close(model(batch).hidden, plain(batch).hidden)
    model(batch).hidden.sum().backward()
    grads = [p.grad for p in model.adapters.parameters()]
    assert all(g is not None and not g.any() for g in grads), (
        "the module must be in the graph, without effect"
    )


# ---- heads and embeddings ----


def test_categorical() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 0.0, 0.0]])
    dist = Categorical(logits)
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([dist.sample(g) for _ in range(2000)])
    assert not (drawn[:, 0] == 2).any(), "an impossible id is never drawn"
    shares = torch.stack([(drawn == i).float().mean(0) for i in range(3)], -1)
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.04, rtol=0)
    assert dist.sample(g, temperature=0).tolist() == [1, 0]
    torch.testing.assert_close(
        dist.log_prob(torch.tensor([1, 0])).exp(), logits.softmax(-1)[[0, 1], [1, 0]]
    )


# ---- learning ----


@pytest.mark.parametrize("pattern", ["attention", "2*rg_lru local_attention"])
def test_it_learns_to_copy(pattern: str) -> None:
    """A sequence and the same again: the second half is certain.

    A model that mixes positions wrongly stays at ln 8.
    """
    model = make(
        d_model=32,
        backbone={"kind": "stack", "pattern": pattern, "depth": 3 if "rg" in pattern else 2},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(0)
    last = []
    for _ in range(150):
        half = torch.randint(18, 26, (16, 6), generator=g)
        x = torch.cat((half, half), 1)
        targets = torch.cat((x[:, 1:], torch.full((16, 1), -1)), 1)[..., None].int()
        places = (torch.arange(16)[:, None] * 12 + torch.arange(6, 11)).flatten().int()
        nll = (
            model(replace(Batch.of_ids(x), targets=targets, places={"tokens": places}))
            .heads["tokens"]
            .nll.mean()
        )
        optimizer.zero_grad()
        nll.backward()
        optimizer.step()
        last.append(nll.item())
    assert last[0] > 1.9 and sum(last[-10:]) / 10 < 0.6, (last[0], last[-10:])


def test_a_field_that_only_the_prompt_has_may_be_left_out_later() -> None:
    """The prompt is an image block that sees itself both ways; the continuation names no block."""
    model = make().double()
    text = ids(1, 7)
    block = np.array([1, 1, 1, 0, 0, 0, 0], np.int32)
    whole = Layout.from_rows([[Doc(7, extra={"prefix": block})]])
    mask = Causal() | Prefix()
    expected = model(Batch.of_ids(text, whole), mask=Prefix()).hidden
    torch.testing.assert_close(model(Batch.of_ids(text, whole), mask=mask).hidden, expected)
    with torch.no_grad():
        first = Layout.from_rows([[Doc(4, slot=0, extra={"prefix": block[:4]})]])
        out = model(
            Batch.of_ids(text[:, :4], first), mask=Prefix(), state=model.initial_state(1, 8)
        )
        torch.testing.assert_close(out.hidden, expected[:, :4])
        for t in range(4, 7):
            step = Layout.from_rows([[Doc(1, slot=0, fresh=False, start=t)]])
            out = model(Batch.of_ids(text[:, t : t + 1], step), state=out.state)
            torch.testing.assert_close(out.hidden, expected[:, t : t + 1])


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_dropout_acts_in_training_only_and_is_recomputed_alike(recompute: str) -> None:
    backbone = {
        "kind": "stack",
        "pattern": "attention",
        "depth": 2,
        "mixers": {"attention": {"heads": 2}},
    }
    plain = make(backbone=backbone)
    dropping = make(backbone={**backbone, "block": {"kind": "prenorm", "dropout": 0.5}})
    dropping.load_state_dict(plain.state_dict())
    batch = Batch.of_ids(ids(2, 6))
    assert torch.equal(dropping.eval()(batch).hidden, plain.eval()(batch).hidden)
    again = make(
        backbone={**backbone, "recompute": recompute, "block": {"kind": "prenorm", "dropout": 0.5}}
    )
    again.load_state_dict(plain.state_dict())
    grads = []
    for model in (dropping.train(), again.train()):
        model(batch, seed=3).heads["tokens"].nll.sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    hidden = [dropping(batch, seed=s).hidden for s in (3, 4)]
    assert not torch.equal(*hidden)
    assert not torch.equal(hidden[0], plain.train()(batch).hidden)
