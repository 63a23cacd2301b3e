"""Layers that share keys, and heads that only count tokens, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from laws import TOL, Chunk, D, alone, apply, documents, packed
from torch import Tensor

from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.backbones.decoder_decoder import CrossAttention, DecoderDecoder
from mm.model.context import Ctx
from mm.model.layer import Layer, init_weights
from mm.model.linears.dense import DenseConfig
from mm.model.mixers.attention.ngram_head import ngram_means
from mm.model.positions.base import Position
from mm.registry import BACKBONES, MIXERS


def filled(layer: Layer) -> Any:
    torch.manual_seed(3)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer.double()


def decoder(**settings: Any) -> DecoderDecoder:
    small = BACKBONES.get("decoder_decoder").smallest().model_dump()
    return filled(BACKBONES.get("decoder_decoder")(**{**small, **settings}).build(D))


def normed(x: Tensor, norm: Any) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


# ---- decoder-decoder ----


@pytest.mark.parametrize("own_keys", [False, True])
def test_upper_layers_attend_to_the_same_place_of_the_stack(own_keys: bool) -> None:
    """Two layers over the model's input, written out: the second sees no state of the first."""
    model = decoder(lower=None, upper=2, own_keys=own_keys, position="none")
    memory, *upper = model.layers
    x = documents(9)[0]
    y, source = x, normed(x, memory.norm)
    for block in upper:
        kv = (block.mixer.kv if own_keys else memory.kv).weight
        k, v = (source @ kv.T).view(9, 2, 8).unbind(1)
        q = (normed(y, block.mixer_norm) @ block.mixer.q.weight.T).view(9, 2, 8).transpose(0, 1)
        hidden = torch.ones(9, 9).triu(1).bool()
        o = (q @ k.T * 8**-0.5).masked_fill(hidden, -math.inf).softmax(-1) @ v
        y = y + o.transpose(0, 1).flatten(1) @ block.mixer.out.weight.T
    torch.testing.assert_close(alone(model, x), normed(y, model.norm), **TOL)


def test_the_cache_is_one_layer_however_many_attend_to_it() -> None:
    tokens = lambda m: m.state_bytes(1, 101) - m.state_bytes(1, 100)
    for upper in (1, 6):
        assert tokens(decoder(upper=upper)) == 2 * 8 * 8 + 12  # keys and values of one head
        assert tokens(decoder(lower=None, own_keys=True, upper=upper)) == D * 8 + 12
    full = BACKBONES.get("stack")(pattern="6*attention", ffn=None).build(D).double()
    assert tokens(full) == 6 * (2 * D * 8 + 12)


@pytest.mark.parametrize("settings", [{}, {"lower": None, "own_keys": True}])
def test_prefill_may_stop_below_the_upper_layers(settings: dict[str, Any]) -> None:
    model, docs = decoder(**settings), documents(9, 6)
    ran: list[int] = []
    for block in model.layers:
        if isinstance(getattr(block, "mixer", None), CrossAttention):
            block.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        state = model.initial_state(2, 16)
        x, layout = packed([[(0, docs[0][:8], 0), (1, docs[1][:5], 0)]])
        state = model.prefill(x, Ctx(layout, Causal()), state)
        assert not ran
        rows: list[list[Chunk]] = [[(0, docs[0][8:], 8)], [(1, docs[1][5:], 5)]]
        x, layout = packed(rows)
        y = apply(model, x, layout, state).y
    assert ran
    for s in range(2):
        torch.testing.assert_close(y[s], alone(model, docs[s])[-1:], **TOL)


@pytest.mark.parametrize("position", ["alibi", "t5_bias", "rope_axes"])
def test_steps_equal_whole_with_every_position(position: str) -> None:
    model, (x,) = decoder(position=position), documents(5)
    with torch.no_grad():
        state, got = model.initial_state(1, 5), []
        for t in range(5):
            layout = Layout.from_rows([[Doc(1, slot=0, fresh=t == 0, start=t)]])
            out = model(x[None, t : t + 1], Ctx(layout, Causal()), state)
            state = out.state
            got.append(out.y[0])
    torch.testing.assert_close(torch.cat(got), alone(model, x), **TOL)


def test_what_does_not_fit_is_refused_by_name() -> None:
    lone = CrossAttention(D, (2, 1, 8), False, Position(), DenseConfig().build).double()
    with pytest.raises(ValueError, match="decoder_decoder"):
        alone(lone, documents(3)[0])
    with pytest.raises(ValueError, match="position 'learned'"):
        decoder(position="learned")


# ---- n-gram heads ----


def counted(h: Tensor, tokens: list[int], n: int) -> Tensor:
    """One document `(T, D)`: the means, token by token."""
    rows = []
    for t in range(len(tokens)):
        now = tokens[t - n + 2 : t + 1] if n > 1 else []
        found = [
            h[j]
            for j in range(n - 1, t + 1)
            if t + 1 >= n - 1 and tokens[j - n + 1 : j] == now
        ]  # fmt: skip
        rows.append(torch.stack(found).mean(0) if found else torch.zeros_like(h[0]))
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ngram_means_are_those_of_a_counter(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    lengths, pad = (40, 1, 13, 64), 3
    h = torch.randn(2, 60 + pad, D, dtype=torch.float64, generator=g).requires_grad_()
    token = torch.randint(3, (2, 60 + pad), generator=g)
    document = torch.zeros(2, 60 + pad, dtype=torch.int32)
    places = [(0, 0, 40), (0, 40, 1), (0, 41, 13), (1, 0, 60)]
    for i, (b, at, size) in enumerate(places, 1):
        document[b, at : at + size] = i
    assert lengths[0] == 40
    got = ngram_means(h, token, document, n)
    weight = torch.randn(got.shape, dtype=torch.float64, generator=g)
    loss, expected = (got * weight).sum(), h.new_zeros(())
    for b, at, size in places:
        part = slice(at, at + size)
        want = counted(h[b, part], token[b, part].tolist(), n)
        torch.testing.assert_close(got[b, part], want, **TOL)
        expected = expected + (want * weight[b, part]).sum()
    a, b = torch.autograd.grad(loss, h)[0], torch.autograd.grad(expected, h)[0]
    torch.testing.assert_close(a, b, **TOL)


def test_an_ngram_head_finds_what_followed() -> None:
    """A B ... A: the head reads what stood at B; without ids it reads nothing."""
    layer = filled(MIXERS.get("ngram_head")(n=2).build(D))
    x = documents(4)[0]
    ids = torch.tensor([5, 8, 2, 5])[None, :, None]
    y = apply(layer, x[None], Layout.plain(1, 4), ids=ids).y[0]
    own = x @ layer.own.weight.T
    torch.testing.assert_close(y[3], own[3] + x[1] @ layer.out.weight.T, **TOL)
    torch.testing.assert_close(y[:3], own[:3], **TOL)
    blind = layer(x[None], Ctx(Layout.plain(1, 4), Causal())).y[0]
    torch.testing.assert_close(blind, own, **TOL)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngram_heads_step_and_draft_as_they_read(n: int) -> None:
    layer = filled(MIXERS.get("ngram_head")(n=n).build(D))
    g = torch.Generator().manual_seed(1)
    docs, ids = documents(11, 11), torch.randint(3, (2, 11, 1), generator=g)
    with torch.no_grad():
        whole = apply(layer, torch.stack(docs), Layout.plain(2, 11), ids=ids).y
        state = layer.initial_state(2, 11)
        assert state.n_bytes() == layer.state_bytes(2, 11)
        for at, stop in ((0, 1), (1, 5), (5, 6), (6, 9)):
            x = torch.stack([d[at : stop + 1] for d in docs])
            given = ids[:, at : stop + 1].clone()
            given[:, -1] = 2 - given[:, -1]  # a wrong guess, refused
            layout = Layout.from_rows(
                [[Doc(stop + 1 - at, slot=s, fresh=at == 0, start=at)] for s in range(2)]
            )
            out = apply(layer, x, layout, state, ids=given, draft=True)
            state = out.state.accept(torch.full((2,), stop - at))
            torch.testing.assert_close(out.y[:, : stop - at], whole[:, at:stop], **TOL)
