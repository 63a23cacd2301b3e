"""The laws of the contract, over whatever is registered: a new file is covered on the day it is registered.

Laws 1-4, 9, 10, 12 of the design; 7 is in test_contract_tokenizers.py, 8 in test_contract_data.py, 11 and 13 in
test_contract_training.py. B rows, T tokens, D model, N slots.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mm
from mm import config as yaml_config
from mm.batch import Batch
from mm.kernels.op import Op
from mm.layout import Doc, Layout
from mm.mask import Causal, Full
from mm.model.backbones.stack import StackConfig, presets
from mm.model.layer import Backbone, Ctx, Layer, Out, init_weights
from mm.registry import (
    ADAPTERS, BACKBONES, BLOCKS, CHANNELS, EMBEDDERS, HEADS, LINEARS, MIXERS, NETWORKS, POSITIONS, Registry,
)
from mm.run import Run
from mm.specs import TokenSpec
from mm.state import State
from mm.vocabulary import Vocabulary

D = 16
MAX_LEN = 16
TOL = {"rtol": 1e-9, "atol": 1e-10}
ROOT = Path(mm.__file__).parent.parent
VOCABULARY = Vocabulary().add(TokenSpec("text", 11)).add(TokenSpec("image", 7)).add(TokenSpec("audio", 5, 2))


def variants() -> dict[str, Callable[[], Layer]]:
    """Every registered layer in its smallest form, every preset, and settings that take other paths through the code."""
    made: dict[str, Callable[[], Layer]] = {}
    for kind in MIXERS:
        made[f"mixer:{kind}"] = lambda kind=kind: MIXERS.get(kind).smallest().build(D)
    for word in presets():
        made[f"preset:{word}"] = lambda word=word: StackConfig(pattern=word).mixer(word).build(D)
    for kind in POSITIONS:
        made[f"position:{kind}"] = lambda kind=kind: MIXERS.get("attention")(heads=2, position=kind).build(D)
    for kind in LINEARS:
        made[f"linear:{kind}"] = lambda kind=kind: MIXERS.get("attention")(heads=2).build(D, LINEARS.get(kind).smallest().build)
    for kind in CHANNELS:
        made[f"channel:{kind}"] = lambda kind=kind: CHANNELS.get(kind).smallest().build(D)
    for kind in BLOCKS:
        mixer, channel = MIXERS.get("attention").smallest(), CHANNELS.get("swiglu")(hidden=8)
        made[f"block:{kind}"] = lambda kind=kind: BLOCKS.get(kind).smallest().build(D, mixer.build(D), channel.build(D))
    for kind in BACKBONES:
        made[f"backbone:{kind}"] = lambda kind=kind: BACKBONES.get(kind).smallest().build(D)
    attention, rg_lru = MIXERS.get("attention"), MIXERS.get("rg_lru")
    made["attention, ring of 3"] = lambda: attention(heads=2, kv_heads=1, window=3).build(D)
    made["attention, ring of 1"] = lambda: attention(heads=2, window=1).build(D)
    made["attention, no QK-norm, wide heads"] = lambda: attention(heads=2, head_dim=6, qk_norm=False).build(D)
    made["rg_lru, other width and taps"] = lambda: rg_lru(width=12, heads=3, taps=2).build(D)
    made["stack, recomputed hybrid"] = lambda: StackConfig(
        depth=3, pattern="rg_lru local_attention", recompute=True, channel={"kind": "swiglu", "hidden": 8},
        mixers={"local_attention": {"heads": 2, "window": 3}, "rg_lru": {"heads": 2}},
    ).build(D)
    return made


VARIANTS = variants()
layers = pytest.mark.parametrize("name", VARIANTS)


def build(name: str, dtype: torch.dtype = torch.float64) -> Layer:
    """The layer in training mode, every parameter away from its special initial value (zeros, ones)."""
    torch.manual_seed(7)
    layer = VARIANTS[name]()
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.to(dtype)


def apply(layer: Layer, x: Tensor, layout: Layout, state: State | None = None, **ctx: Any) -> Out:
    return layer(x, Ctx(layout, ctx.pop("mask", Causal()), **ctx), state)


def documents(*lengths: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, dtype=torch.float64, generator=g) for n in lengths]


def alone(layer: Layer, x_TD: Tensor) -> Tensor:
    """What the layer makes of one whole document in a call of its own: the meaning that all other ways must match."""
    return apply(layer, x_TD[None], Layout.plain(1, len(x_TD))).y[0]


Chunk = tuple[int, Tensor, int]  # slot, tokens, how many of its document came before


def packed(rows: list[list[Chunk]], pad: int = 0, **doc: Any) -> tuple[Tensor, Layout]:
    """Lay chunks of several slots out in rows, each row padded to the longest and by ``pad``; padding holds large numbers."""
    T = max(sum(len(x) for _, x, _ in row) for row in rows) + pad
    layout = Layout.from_rows(
        [[Doc(len(x), slot=slot, fresh=doc.get("fresh", before == 0), start=before) for slot, x, before in row] for row in rows], T
    )
    x = torch.full((len(rows), T, D), 1e3, dtype=torch.float64)
    for b, row in enumerate(rows):
        at = 0
        for _, tokens, _ in row:
            x[b, at : at + len(tokens)] = tokens
            at += len(tokens)
    return x, layout


def unpacked(y: Tensor, rows: list[list[Chunk]]) -> Iterator[tuple[int, Tensor]]:
    for b, row in enumerate(rows):
        at = 0
        for slot, tokens, _ in row:
            yield slot, y[b, at : at + len(tokens)]
            at += len(tokens)


def serve(layer: Layer, docs: list[Tensor], plan: list[list[list[tuple[int, int]]]], state: State | None, pad: int = 1) -> list[Tensor]:
    """Feed documents (document i in slot i) by a plan of calls, of rows, of (slot, number of tokens); returns all outputs."""
    done = [0] * len(docs)
    outs: list[list[Tensor]] = [[] for _ in docs]
    for call in plan:
        rows: list[list[Chunk]] = []
        for row in call:
            rows.append([])
            for slot, n in row:
                rows[-1].append((slot, docs[slot][done[slot] : done[slot] + n], done[slot]))
                done[slot] += n
        x, layout = packed(rows, pad)
        out = apply(layer, x, layout, state)
        state = out.state
        for slot, y in unpacked(out.y, rows):
            outs[slot].append(y)
    assert done == [len(d) for d in docs], "the plan must feed every document to its end"
    return [torch.cat(parts) for parts in outs]


LENGTHS = (7, 5, 1, 9)
PLANS: dict[str, list[list[list[tuple[int, int]]]]] = {
    "whole documents, two a row": [[[(0, 7), (1, 5)], [(2, 1), (3, 9)]]],
    "chunks of unlike progress": [
        [[(0, 3)], [(3, 4), (1, 1)]], [[(1, 2), (0, 1), (3, 1)]], [[(2, 1), (0, 3)], [(1, 2)], [(3, 4)]],
    ],
    "prefill beside single tokens": [[[(0, 6), (3, 1)]], [[(3, 7), (0, 1), (1, 1)]], [[(2, 1), (3, 1), (1, 4)]]],
    "one document after another": [[[(0, 7)]], [[(1, 5)]], [[(2, 1)]], [[(3, 2)]], [[(3, 7)]]],
    "steps in aligned rows": [
        [[(0, 1)], [(1, 1)], [(2, 1)], [(3, 1)]],
        *[[[(0, 1)], [(1, 1)], [(2, 0)], [(3, 1)]]] * 4, *[[[(0, 1)], [(1, 0)], [(2, 0)], [(3, 1)]]] * 2,
        *[[[(0, 0)], [(1, 0)], [(2, 0)], [(3, 1)]]] * 2,
    ],
    "aligned ragged prefill, then steps": [
        [[(0, 6)], [(1, 2)], [(2, 1)], [(3, 8)]], [[(0, 1)], [(1, 1)], [(2, 0)], [(3, 1)]], *[[[(0, 0)], [(1, 1)], [(2, 0)], [(3, 0)]]] * 2,
    ],
}


# ---- law 1: full == chunked == packed serving == step == drafted ----------------------------------------------------


def test_every_layer_says_how_its_output_lags() -> None:
    """The helpers here compare output t with output t; the first layer with lookahead must teach them its shift and flush."""
    for name in VARIANTS:
        assert build(name).caps.lookahead == 0, name


@layers
def test_law1_packed_rows_equal_separate_documents(name: str) -> None:
    layer, docs = build(name), documents(*LENGTHS)
    x, layout = packed([[(-1, docs[0], 0), (-1, docs[1], 0)], [(-1, docs[2], 0), (-1, docs[3], 0)]], pad=2)
    y = apply(layer, x, layout).y
    for (_, got), doc in zip(unpacked(y, [[(-1, docs[0], 0), (-1, docs[1], 0)], [(-1, docs[2], 0), (-1, docs[3], 0)]]), docs, strict=True):
        torch.testing.assert_close(got, alone(layer, doc), **TOL)


@layers
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_law1_serving_equals_whole(name: str, plan: str, grad: bool) -> None:
    """Also with gradients recorded, when a State may not be changed in place."""
    layer, docs = build(name), documents(*LENGTHS)
    with torch.set_grad_enabled(grad):
        got = serve(layer, docs, PLANS[plan], layer.initial_state(len(docs), MAX_LEN))
        for y, doc in zip(got, docs, strict=True):
            torch.testing.assert_close(y, alone(layer, doc), **TOL)


@layers
@pytest.mark.parametrize("plan", ["chunks of unlike progress", "steps in aligned rows"])
def test_law1_gradients_of_serving_equal_those_of_whole(name: str, plan: str) -> None:
    layer = build(name)
    weights = documents(*LENGTHS, seed=1)

    def gradients(run: Callable[[list[Tensor]], list[Tensor]]) -> tuple[Tensor, ...]:
        docs = [d.requires_grad_() for d in documents(*LENGTHS)]
        loss = sum((y * w).sum() for y, w in zip(run(docs), weights, strict=True))
        return torch.autograd.grad(loss, [*docs, *layer.parameters()])

    whole = gradients(lambda docs: [alone(layer, d) for d in docs])
    parts = gradients(lambda docs: serve(layer, docs, PLANS[plan], layer.initial_state(len(docs), MAX_LEN)))
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, **TOL)


@layers
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "packed"])
@pytest.mark.parametrize("accepted", [(0, 0, 0), (3, 1, 0), (1, 0, 4), (3, 2, 4)])
def test_law1_draft_and_accept_equal_having_fed_the_prefix(name: str, accepted: tuple[int, ...], aligned: bool) -> None:
    """Slots draft 3, 2 and 4 tokens, of which some are wrong guesses; slot 1 is fresh: its draft call is its first."""
    layer = build(name)
    docs, drafted, before = documents(9, 6, 9), (3, 2, 4), (4, 0, 3)
    with torch.no_grad():
        state = layer.initial_state(3, MAX_LEN)
        x, layout = packed([[(0, docs[0][:4], 0)], [(2, docs[2][:3], 0)]])
        state = apply(layer, x, layout, state).state
        guess = [
            torch.cat((d[b : b + n], 9.0 + torch.randn(m - n, D, dtype=torch.float64)))
            for d, b, n, m in zip(docs, before, accepted, drafted, strict=True)
        ]
        chunks = [(slot, guess[slot], before[slot]) for slot in range(3)]
        rows = [[c] for c in chunks] if aligned else [[chunks[2], chunks[0]], [chunks[1]]]
        x, layout = packed(rows)
        assert layout.aligned is aligned
        out = apply(layer, x, layout, state, draft=True)
        for slot, y in unpacked(out.y, rows):
            n = accepted[slot]
            torch.testing.assert_close(y[:n], alone(layer, docs[slot])[before[slot] : before[slot] + n], **TOL)
        state = out.state.accept(torch.tensor(accepted)) if out.state is not None else None
        at = [b + n for b, n in zip(before, accepted, strict=True)]
        rows = [[(s, docs[s][at[s] : at[s] + 2], at[s]) for s in (1, 0)], [(2, docs[2][at[2] : at[2] + 2], at[2])]]
        x, layout = packed(rows)
        for slot, y in unpacked(apply(layer, x, layout, state).y, rows):
            torch.testing.assert_close(y, alone(layer, docs[slot][: at[slot] + 2])[at[slot] :], **TOL)


@layers
def test_law1_an_unaccepted_draft_counts_as_fed(name: str) -> None:
    layer, (doc,) = build(name), documents(8)
    with torch.no_grad():
        state = layer.initial_state(1, MAX_LEN)
        got = []
        for at in range(0, 8, 2):
            x, layout = packed([[(0, doc[at : at + 2], at)]])
            out = apply(layer, x, layout, state, draft=at % 4 == 0)
            state = out.state
            got.append(out.y[0, :2])
        torch.testing.assert_close(torch.cat(got), alone(layer, doc), **TOL)


@layers
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_law1_slots_that_get_no_token_keep_their_state_bit_for_bit(name: str, grad: bool) -> None:
    layer, docs = build(name), documents(5, 4, 6)
    with torch.set_grad_enabled(grad):
        state = layer.initial_state(3, MAX_LEN)
        if state is None:
            pytest.skip("this layer has no State")
        x, layout = packed([[(0, docs[0][:4], 0), (1, docs[1][:3], 0)], [(2, docs[2][:5], 0)]])
        state = apply(layer, x, layout, state).state
        assert state is not None
        kept = [leaf.clone() for leaf in state.leaves()]
        cases = {
            "a row of padding": packed([[]], pad=4),
            "a document of no tokens in aligned rows": packed([[(s, docs[s][:0], 3)] for s in range(3)], pad=2),
            "a document of no tokens in a packed row": packed([[(1, docs[1][:0], 3), (-1, docs[0], 0)]], pad=1),
            "documents without a slot": packed([[(-1, docs[0], 0), (-1, docs[1], 0)]]),
            "rows without a slot, aligned": packed([[(-1, docs[0], 0)], [(-1, docs[1], 0)], [(-1, docs[2], 0)]]),
        }
        for case, (x, layout) in cases.items():
            for draft in (False, True):
                after = apply(layer, x, layout, state.fork(), draft=draft).state
                assert after is not None
                after = after.accept(torch.full((3,), 9)) if draft else after
                for old, new in zip(kept, after.leaves(), strict=True):
                    assert torch.equal(old, new), f"{case}, draft={draft}"


@layers
def test_law1_slots_can_be_reordered_joined_and_left(name: str) -> None:
    layer, docs = build(name), documents(6, 6, 6)
    with torch.no_grad():
        state = layer.initial_state(2, MAX_LEN)
        if state is None:
            pytest.skip("this layer has no State")
        x, layout = packed([[(0, docs[0][:3], 0)], [(1, docs[1][:2], 0)]])
        state = apply(layer, x, layout, state).state
        x, layout = packed([[(0, docs[2][:4], 0)]])
        other = apply(layer, x, layout, layer.initial_state(1, MAX_LEN)).state
        assert state is not None and other is not None
        state = state.cat(other).select(torch.tensor([2, 0, 0]))  # document 1 leaves, document 0 is continued twice
        rows: list[list[Chunk]] = [[(0, docs[2][4:], 4)], [(1, docs[0][3:], 3)], [(2, docs[0][3:5], 3)]]
        x, layout = packed(rows)
        y = dict(unpacked(apply(layer, x, layout, state).y, rows))
        torch.testing.assert_close(y[0], alone(layer, docs[2])[4:], **TOL)
        torch.testing.assert_close(y[1], alone(layer, docs[0])[3:], **TOL)
        torch.testing.assert_close(y[2], alone(layer, docs[0])[3:5], **TOL)


@layers
def test_law1_the_last_document_of_a_slot_wins_and_a_fresh_one_starts_again(name: str) -> None:
    layer, docs = build(name), documents(4, 5, 6)
    with torch.no_grad():
        state = layer.initial_state(1, MAX_LEN)
        x, layout = packed([[(0, docs[0], 0)]])
        state = apply(layer, x, layout, state).state
        x, layout = packed([[(0, docs[1][:3], 0), (0, docs[2][:4], 0)]])
        state = apply(layer, x, layout, state).state
        x, layout = packed([[(0, docs[2][4:], 4)]])
        torch.testing.assert_close(apply(layer, x, layout, state).y[0], alone(layer, docs[2])[4:], **TOL)


# ---- law 2: causality ------------------------------------------------------------------------------------------------


def jacobian(layer: Layer, T: int, mask: Any) -> Tensor:
    """`(T, T)`: how much output t moves with input s."""
    (x,) = documents(T)
    f = lambda x: apply(layer, x[None], Layout.plain(1, T), mask=mask).y[0]
    return torch.autograd.functional.jacobian(f, x).abs().sum((1, 3))


@layers
def test_law2_no_output_depends_on_the_future(name: str) -> None:
    layer, T = build(name), 6
    if not layer.caps.causal:
        pytest.skip("not causal")
    moved = jacobian(layer, T, Causal())
    future = torch.ones(T, T, dtype=torch.bool).triu(1 + layer.caps.lookahead)
    assert moved[future].eq(0).all()
    assert moved.diagonal().gt(0).all(), "the law would hold for a layer that ignores its input, too"


@layers
def test_law2_a_bidirectional_layer_depends_on_both_sides(name: str) -> None:
    layer, T = build(name), 6
    if not layer.caps.bidirectional:
        pytest.skip("causal only")
    moved = jacobian(layer, T, Full())
    window = getattr(layer, "window", None)
    assert window is not None or moved.gt(0).all()


# ---- law 3: documents do not leak ------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("value", [5.0, float("inf"), float("nan")])
def test_law3_a_changed_token_moves_no_other_document(name: str, value: float) -> None:
    layer, docs = build(name), documents(4, 5, 3)
    rows = [[(-1, d, 0) for d in docs]]
    x, layout = packed(rows, pad=1)
    with torch.no_grad():
        clean = dict(enumerate(y for _, y in unpacked(apply(layer, x, layout).y, rows)))
        for changed in range(3):
            dirty = [d.clone() for d in docs]
            dirty[changed][1] = value
            x, _ = packed([[(-1, d, 0) for d in dirty]], pad=1)
            after = list(unpacked(apply(layer, x, layout).y, rows))
            for i in range(3):
                assert torch.equal(after[i][1], clean[i]) == (i != changed), f"document {i} when {changed} changed"


@layers
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "packed"])
def test_law3_slots_do_not_leak(name: str, aligned: bool) -> None:
    """Neither between slots of a call, nor from a sequence to the next one that takes its slot."""
    layer, docs = build(name), documents(4, 5)
    poison = torch.full((4, D), float("inf"), dtype=torch.float64)
    with torch.no_grad():
        outs = []
        for neighbour in (docs[0], poison):
            state = layer.initial_state(2, MAX_LEN)
            for at, stop in ((0, 3), (3, 4)):
                chunks = [(0, neighbour[at:stop], at), (1, docs[1][at:stop], at)]
                x, layout = packed([[c] for c in chunks] if aligned else [chunks])
                out = apply(layer, x, layout, state)
                state = out.state
                outs.append([y for slot, y in unpacked(out.y, [[c] for c in chunks] if aligned else [chunks]) if slot == 1][0])
        assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
        chunks = [(0, docs[0][:3], 0), (1, docs[1][4:], 4)]  # slot 0 held inf; a new sequence takes it
        rows = [[c] for c in chunks] if aligned else [chunks]
        x, layout = packed(rows)
        y = dict(unpacked(apply(layer, x, layout, state).y, rows))
        torch.testing.assert_close(y[0], alone(layer, docs[0])[:3], **TOL)
        torch.testing.assert_close(y[1], alone(layer, docs[1])[4:], **TOL)


# ---- law 4: state bytes ----------------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_law4_live_state_bytes_follow_the_declared_formula(name: str, dtype: torch.dtype) -> None:
    layer = build(name, dtype)
    for n, max_len in ((1, 1), (2, 5), (3, 64)):
        state = layer.initial_state(n, max_len)
        assert (state.n_bytes() if state is not None else 0) == layer.state_bytes(n, max_len), (n, max_len)
        if state is None:
            continue
        assert all(leaf.shape[0] == n for leaf in state.leaves()), "dim 0 of every leaf is the slot"
        with torch.no_grad():
            after = apply(layer, torch.randn(n, 1, D, dtype=dtype), Layout.from_rows([[Doc(1, slot=i)] for i in range(n)]), state).state
        assert after is not None and after.n_bytes() == layer.state_bytes(n, max_len)


# ---- law 9: everything builds on the meta device, initialisation is complete -----------------------------------------


def assert_init_fills(module: nn.Module) -> None:
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.is_floating_point():
                t.fill_(float("nan"))
            elif t.dtype != torch.bool:
                t.fill_(-(10**6))
            assert t.device.type == "cpu", name
    init_weights(module)
    left = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_floating_point() and t.isnan().any()]
    assert not left, f"init_weights leaves NaN in {left}"


@layers
def test_law9_init_weights_fills_every_tensor_of_a_layer(name: str) -> None:
    with torch.device("meta"):
        layer = VARIANTS[name]()
    assert all(p.is_meta for p in layer.parameters())
    assert_init_fills(layer)


PLUGS = {
    "embedder": (EMBEDDERS, lambda c: c.build(20, D)), "adapter": (ADAPTERS, lambda c: c.build(D)),
    "head": (HEADS, lambda c: c.build(D, 20)), "network": (NETWORKS, lambda c: c.build(VOCABULARY)),
}


@pytest.mark.parametrize("plug,kind", [(plug, kind) for plug, (registry, _) in PLUGS.items() for kind in registry])
def test_law9_init_weights_fills_every_tensor_of_a_plug(plug: str, kind: str) -> None:
    registry, make = PLUGS[plug]
    with torch.device("meta"):
        module = make(registry.get(kind).smallest())
    assert_init_fills(module)


def yaml_files() -> list[str]:
    return sorted(str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", yaml_files())
def test_law9_every_yaml_builds_on_the_meta_device(file: str) -> None:
    values = yaml_config.read(ROOT / "configs" / file)
    if "stages" in values:
        networks = [Run.load(ROOT / "configs" / file).model]
    else:
        # Everything else says its kind (the folder says which plug point, where several know it), or names plug points.
        kind, folder = values.get("kind"), Path(file).parts[0]
        named = {k: v for k, v in values.items() if k in Registry.every} if kind is None else {}
        homes = [r for r in Registry.every.values() if kind in r]
        homes = [r for r in homes if r.name == folder] or homes
        assert homes or named, f"configs/{file}: neither a run (stages:), a known kind ('{kind}') nor a plug point"
        parsed = [(Registry.every[k], v) for k, v in named.items()] or [(homes[0], values)]
        networks = []
        for registry, value in parsed:
            config = registry.parse(value)
            networks += [config] if registry is NETWORKS else []
            if registry is MIXERS:
                with torch.device("meta"):
                    assert list(config.build(D).parameters())
    for network in networks:
        with torch.device("meta"):
            module = network.build(VOCABULARY)
        assert all(p.is_meta for p in module.parameters())


def test_law9_the_configs_are_found() -> None:
    assert any(f.startswith("mixer/") for f in yaml_files()), "the parametrisation above would be empty"


# ---- law 10: recomputation -------------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("stateful", [False, True])
def test_law10_recomputation_is_bit_exact_and_a_forward_changes_nothing(name: str, stateful: bool) -> None:
    layer, docs = build(name), documents(4, 5)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x, layout = packed([[(0, docs[0], 0), (1, docs[1], 0)]], pad=1)
    weight = torch.randn_like(x)
    ctx = Ctx(layout, Causal(), seed=3)

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        inputs = x.clone().requires_grad_()
        state = layer.initial_state(2, MAX_LEN) if stateful else None
        out = checkpoint(layer, inputs, ctx, state, use_reentrant=False) if recompute else layer(inputs, ctx, state)
        loss = (out.y * weight).sum() + sum(s.total for s in out.aux.values())
        # States are differentiable too: truncating is the caller's choice.
        loss = loss + sum(leaf.sum() for leaf in (out.state.leaves() if out.state is not None else ()) if leaf.requires_grad)
        return loss.detach(), *torch.autograd.grad(loss, [inputs, *layer.parameters()], allow_unused=True)

    plain, again = gradients(False), gradients(True)
    for a, b in zip(plain, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert any(g is not None and g.abs().sum() > 0 for g in plain[1:])
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_law10_reentrant_checkpointing_is_nowhere() -> None:
    """It loses gradients of returned States and of published values silently; DeepSpeed's own is reentrant."""
    banned = re.compile(r"use_reentrant\s*=\s*True|deepspeed\.checkpointing|activation_checkpointing")
    implicit = re.compile(r"(?<![\w.])checkpoint\((?!.*use_reentrant=False)(?=.*\blayer\b)")
    files = [p for top in ("mm", "tokenizers", "data", "kernels", "launch") for p in (ROOT / top).rglob("*.py")]
    assert len(files) > 20
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not banned.search(line) and not implicit.search(line), f"{path}:{number}: {line.strip()}"


# ---- law 12: torch.compile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.split(":")[0] in ("mixer", "preset", "channel", "block")])
def test_law12_compile_captures_a_block_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    if name.startswith(("mixer", "preset")):
        torch.manual_seed(0)
        layer: Layer = BLOCKS.get("prenorm")().build(D, VARIANTS[name](), CHANNELS.get("swiglu")(hidden=8).build(D))
        init_weights(layer)
        layer = layer.double()
    else:
        layer = build(name)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    ctx = Ctx(Layout.plain(2, 5), Causal())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, ctx).y, layer(x, ctx).y
    torch.testing.assert_close(y, expected, **TOL)
    for a, b in zip(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True):
        torch.testing.assert_close(a, b, **TOL)


def ops() -> dict[str, Op]:
    import mm.kernels as kernels

    for module in pkgutil.iter_modules(kernels.__path__, "mm.kernels."):
        if module.ispkg:
            importlib.import_module(module.name)
    return {name: op for name, op in Op.every.items() if op.__module__.startswith("mm.kernels.")}


def example(op: str) -> tuple[Tensor, ...]:
    """Arguments of a small call of every Op: a new Op adds its own here."""
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    arguments = {
        "attention": (r(2, 5, 4, 6), r(2, 5, 2, 6), r(2, 5, 2, 3), torch.ones(2, 5, 5, dtype=torch.bool).tril()),
        "linear_scan": (r(2, 5, 3).sigmoid().detach().requires_grad_(), r(2, 5, 3), torch.rand(2, 5) < 0.3, r(2, 3)),
        "linear_cross_entropy": (r(5, 4), r(7, 4), torch.randint(7, (5,)), r(7)),
        "rms_norm": (r(2, 5, 6), r(6)),
        "glu": (r(2, 5, 6), r(2, 5, 6)),
        "causal_conv": (r(2, 5, 3), r(4, 3), r(3), torch.tensor([[1, 1, 2, 2, 2], [3, 3, 3, 3, 0]], dtype=torch.int32)),
        "rg_lru_gates": (r(2, 5, 6), r(2, 6), r(6).exp().detach().requires_grad_(), r(5, 6)),
    }
    assert op in arguments, f"give the Op '{op}' an example call here, so that the laws cover it"
    return arguments[op]


def test_law12_there_are_ops() -> None:
    assert len(ops()) >= 7


@pytest.mark.parametrize("name,implementation", [(n, i) for n, op in ops().items() for i in op.implementations])
def test_law12_every_op_compiles_with_its_gradient(name: str, implementation: str) -> None:
    op, arguments = ops()[name], example(name)
    reason = op.implementations[implementation][1](*arguments)
    if reason:
        pytest.skip(f"{implementation}: {reason}")
    torch._dynamo.reset()
    total = lambda out: sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()
    leaves = [a for a in arguments if a.is_floating_point()]
    with op.using(implementation):
        compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
        got, expected = compiled(*arguments), op(*arguments)
        torch.testing.assert_close(got, expected, **TOL)
        for a, b in zip(torch.autograd.grad(total(got), leaves), torch.autograd.grad(total(expected), leaves), strict=True):
            torch.testing.assert_close(a, b, **TOL)


# ---- the whole model keeps the laws of its parts ---------------------------------------------------------------------


def test_backbones_own_one_state_per_visit() -> None:
    for kind in BACKBONES:
        layer = build(f"backbone:{kind}")
        assert isinstance(layer, Backbone)
        path = [0, 1, 1, 0]
        x, layout = packed([[(0, documents(6)[0], 0)]])
        whole = layer(x, Ctx(layout, Causal()), None, path).y
        with torch.no_grad():
            state = layer.initial_state(1, MAX_LEN, path=path)  # type: ignore[call-arg]
            got = []
            for t in range(6):
                one, layout = packed([[(0, x[0, t : t + 1], t)]])
                out = layer(one, Ctx(layout, Causal()), state, path)
                state = out.state
                got.append(out.y[0])
        torch.testing.assert_close(torch.cat(got), whole[0], **TOL)


def test_a_model_served_from_slots_equals_the_model_on_whole_documents() -> None:
    config = NETWORKS.get("lm").smallest()
    torch.manual_seed(0)
    model = config.build(VOCABULARY)
    init_weights(model)
    model.double()
    ids = torch.randint(VOCABULARY.size, (1, 8))
    whole = model(Batch.of_ids(ids), loss=False).heads["tokens"].dist.logits
    state = model.initial_state(1, 8)
    with torch.no_grad():
        for t in range(8):
            layout = Layout.from_rows([[Doc(1, slot=0, fresh=t == 0, start=t)]])
            out = model(Batch.of_ids(ids[:, t : t + 1], layout), state=state, loss=False)
            state = out.state
            torch.testing.assert_close(out.heads["tokens"].dist.logits[0], whole[t], **TOL)


def test_a_context_is_immutable() -> None:
    ctx = Ctx(Layout.plain(1, 1), Causal())
    with pytest.raises(AttributeError):
        ctx.visit = 3  # type: ignore[misc]
    assert replace(ctx, visit=3).visit == 3 and ctx.visit == 0


def test_yaml_files_are_plain() -> None:
    for file in yaml_files():
        assert isinstance(yaml.safe_load((ROOT / "configs" / file).read_text(encoding="utf-8")), dict), file
