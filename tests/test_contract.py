"""The laws of the contract, over whatever is registered.

A new file is covered on the day it is registered.

`packed = separate`, `full = chunked = step`, `causality`, `no leak`, `matrix form`, `recompute`.
The others: test_contract_state.py, test_contract_build.py, tokenizers/test_contract_tokenizers.py,
data/test_contract_data.py, trainer/test_contract_training.py; all of them with what they say:
docs/architecture.md. B rows, T tokens, D model, N slots.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import (
    LENGTHS,
    MAX_LEN,
    PLANS,
    ROOT,
    TOL,
    VARIANTS,
    Chunk,
    D,
    alone,
    apply,
    build,
    context,
    documents,
    layers,
    packed,
    serve,
    unpacked,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm.layout import Layout
from mm.mask import Causal, Full
from mm.model.context import Ctx
from mm.model.layer import Layer, LinearMixer

# ---- full == chunked == packed serving == step == drafted ----


def test_every_layer_says_how_its_output_lags() -> None:
    """The helpers here compare output t with output t.

    The first layer with lookahead must teach them its shift and flush.
    """
    for name in VARIANTS:
        assert build(name).caps.lookahead == 0, name


@layers
def test_packed_rows_equal_separate_documents(name: str) -> None:
    layer, docs = build(name), documents(*LENGTHS)
    x, layout = packed(
        [[(-1, docs[0], 0), (-1, docs[1], 0)], [(-1, docs[2], 0), (-1, docs[3], 0)]], pad=2
    )
    y = apply(layer, x, layout).y
    for (_, got), doc in zip(
        unpacked(y, [[(-1, docs[0], 0), (-1, docs[1], 0)], [(-1, docs[2], 0), (-1, docs[3], 0)]]),
        docs,
        strict=True,
    ):
        torch.testing.assert_close(got, alone(layer, doc), **TOL)


@layers
def test_gradients_of_packed_rows_equal_those_of_separate_documents(name: str) -> None:
    layer, weights = build(name), documents(*LENGTHS, seed=1)

    def gradients(run: Callable[[list[Tensor]], list[Tensor]]) -> tuple[Tensor, ...]:
        docs = [d.requires_grad_() for d in documents(*LENGTHS)]
        loss = sum((y * w).sum() for y, w in zip(run(docs), weights, strict=True))
        return torch.autograd.grad(loss, [*docs, *layer.parameters()])

    def together(docs: list[Tensor]) -> list[Tensor]:
        rows = [[(-1, docs[0], 0), (-1, docs[1], 0)], [(-1, docs[2], 0), (-1, docs[3], 0)]]
        x, layout = packed(rows, pad=2)
        return [y for _, y in unpacked(apply(layer, x, layout).y, rows)]

    whole = gradients(lambda docs: [alone(layer, d) for d in docs])
    for a, b in zip(gradients(together), whole, strict=True):
        torch.testing.assert_close(a, b, **TOL)


@layers
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_serving_equals_whole(name: str, plan: str, grad: bool) -> None:
    """Also with gradients recorded, when a State may not be changed in place."""
    layer, docs = build(name), documents(*LENGTHS)
    with torch.set_grad_enabled(grad):
        got = serve(layer, docs, PLANS[plan], layer.initial_state(len(docs), MAX_LEN))
        for y, doc in zip(got, docs, strict=True):
            torch.testing.assert_close(y, alone(layer, doc), **TOL)


@layers
@pytest.mark.parametrize("plan", ["chunks of unlike progress", "steps in aligned rows"])
def test_gradients_of_serving_equal_those_of_whole(name: str, plan: str) -> None:
    layer = build(name)
    weights = documents(*LENGTHS, seed=1)

    def gradients(run: Callable[[list[Tensor]], list[Tensor]]) -> tuple[Tensor, ...]:
        docs = [d.requires_grad_() for d in documents(*LENGTHS)]
        loss = sum((y * w).sum() for y, w in zip(run(docs), weights, strict=True))
        return torch.autograd.grad(loss, [*docs, *layer.parameters()])

    whole = gradients(lambda docs: [alone(layer, d) for d in docs])
    parts = gradients(
        lambda docs: serve(layer, docs, PLANS[plan], layer.initial_state(len(docs), MAX_LEN))
    )
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, **TOL)


# ---- causality ----


def jacobian(layer: Layer, T: int, mask: Any) -> Tensor:
    """`(T, T)`: how much output t moves with input s."""
    (x,) = documents(T)
    f = lambda x: apply(layer, x[None], Layout.plain(1, T), mask=mask).y[0]
    return torch.autograd.functional.jacobian(f, x).abs().sum((1, 3))


@layers
def test_no_output_depends_on_the_future(name: str) -> None:
    layer, T = build(name), 6
    if not layer.caps.causal:
        pytest.skip("not causal")
    moved = jacobian(layer, T, Causal())
    future = torch.ones(T, T, dtype=torch.bool).triu(1 + layer.caps.lookahead)
    assert moved[future].eq(0).all()
    assert moved.diagonal().gt(0).all(), (
        "the law would hold for a layer that ignores its input, too"
    )


@layers
def test_a_bidirectional_layer_depends_on_both_sides(name: str) -> None:
    layer, T = build(name), 6
    if not layer.caps.bidirectional:
        pytest.skip("causal only")
    if getattr(layer, "window", None) is not None:
        pytest.skip("its own window looks back only")
    assert jacobian(layer, T, Full()).gt(0).all()


# ---- documents do not leak ----


@layers
@pytest.mark.parametrize("value", [5.0, float("inf"), float("nan")])
def test_a_changed_token_moves_no_other_document(name: str, value: float) -> None:
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
                assert torch.equal(after[i][1], clean[i]) == (i != changed), (
                    f"document {i} when {changed} changed"
                )


@layers
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "packed"])
def test_slots_do_not_leak(name: str, aligned: bool) -> None:
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
                outs.append(
                    [
                        y
                        for slot, y in unpacked(
                            out.y, [[c] for c in chunks] if aligned else [chunks]
                        )
                        if slot == 1
                    ][0]
                )
        assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
        chunks = [
            (0, docs[0][:3], 0),
            (1, docs[1][4:], 4),
        ]  # slot 0 held inf; a new sequence takes it
        rows = [[c] for c in chunks] if aligned else [chunks]
        x, layout = packed(rows)
        y = dict(unpacked(apply(layer, x, layout, state).y, rows))
        torch.testing.assert_close(y[0], alone(layer, docs[0])[:3], **TOL)
        torch.testing.assert_close(y[1], alone(layer, docs[1])[4:], **TOL)


# ---- a linear mixer is a matrix ----


@layers
def test_the_attention_matrix_times_the_values_is_the_core(name: str) -> None:
    layer, docs = build(name), documents(*LENGTHS)
    if not isinstance(layer, LinearMixer):
        pytest.skip("not a LinearMixer")
    rows: list[list[Chunk]] = [
        [(-1, docs[0], 0), (-1, docs[1], 0)],
        [(-1, docs[2], 0), (-1, docs[3], 0)],
    ]
    x, layout = packed(rows, pad=1)
    ctx = Ctx(layout, Causal())
    f, _ = layer.features(x, ctx, None)
    o, state = layer.core(f, ctx, None)
    assert state is None
    product = torch.einsum("bhts,bshv->bthv", layer.attention_matrix(f, ctx), f["v"])
    real = layout.fields.document > 0
    torch.testing.assert_close(product[real], o[real], **TOL)
    assert torch.equal(layer.finish(o, x, f, ctx), apply(layer, x, layout).y)


# ---- recomputation ----


@layers
@pytest.mark.parametrize("stateful", [False, True])
def test_recomputation_is_bit_exact_and_a_forward_changes_nothing(
    name: str, stateful: bool
) -> None:
    layer, docs = build(name), documents(4, 5)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x, layout = packed([[(0, docs[0], 0), (1, docs[1], 0)]], pad=1)
    weight = torch.randn_like(x)
    ctx = context(layer, x, layout, ids=None, seed=3)

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        inputs = x.clone().requires_grad_()
        state = layer.initial_state(2, MAX_LEN) if stateful else None
        out = (
            checkpoint(layer, inputs, ctx, state, use_reentrant=False)
            if recompute
            else layer(inputs, ctx, state)
        )
        loss = (out.y * weight).sum() + sum(s.total.sum() for s in out.aux.values())
        # States are differentiable too: truncating is the caller's choice.
        loss = loss + sum(
            leaf.sum()
            for leaf in (out.state.leaves() if out.state is not None else ())
            if leaf.requires_grad
        )
        return loss.detach(), *torch.autograd.grad(
            loss, [inputs, *layer.parameters()], allow_unused=True
        )

    plain, again = gradients(False), gradients(True)
    for a, b in zip(plain, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert any(g is not None and g.abs().sum() > 0 for g in plain[1:])
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_reentrant_checkpointing_is_nowhere() -> None:
    """It loses gradients of returned States and of published values silently.

    DeepSpeed's own is reentrant.
    """
    banned = re.compile(
        r"use_reentrant\s*=\s*True|deepspeed\.checkpointing|activation_checkpointing"
    )
    implicit = re.compile(r"(?<![\w.])checkpoint\((?!.*use_reentrant=False)(?=.*\blayer\b)")
    files = [
        p
        for top in ("mm", "tokenizers", "data", "kernels", "launch")
        for p in (ROOT / top).rglob("*.py")
    ]
    assert len(files) > 20
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not banned.search(line) and not implicit.search(line), (
                f"{path}:{number}: {line.strip()}"
            )
