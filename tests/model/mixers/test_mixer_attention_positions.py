"""Where attention looks: scores of positions, lengths, spans, axes of RoPE."""

from __future__ import annotations

import math

import pytest
import torch
from attention_toys import build, causal_softmax, heads, merged
from laws import TOL, D, alone, apply, documents, packed

from mm import config as yaml_config
from mm.layout import Doc, Fields, Layout
from mm.mask import Causal, Full
from mm.model.context import Ctx
from mm.registry import BACKBONES, POSITIONS

POSITIONED = (
    "latent_attention", "kv_shift", "differential_attention", "selective_attention",
    "cog_attention",
)  # fmt: skip


@pytest.mark.parametrize("kind", POSITIONED)
def test_positions_that_score_are_added_in_every_form(kind: str) -> None:
    """Steps from a cache and packed documents equal whole documents with ALiBi."""
    layer, docs = build(kind, position="alibi"), documents(5, 3)
    x, layout = packed([[(-1, docs[0], 0), (-1, docs[1], 0)]])
    y = apply(layer, x, layout).y[0]
    torch.testing.assert_close(y[:5], alone(layer, docs[0]), **TOL)
    torch.testing.assert_close(y[5:8], alone(layer, docs[1]), **TOL)
    with torch.no_grad():
        state, got = layer.initial_state(1, 5), []
        for t in range(5):
            layout = Layout.from_rows([[Doc(1, slot=0, fresh=t == 0, start=t)]])
            out = layer(docs[0][None, t : t + 1], Ctx(layout, Causal()), state)
            state = out.state
            got.append(out.y[0])
    torch.testing.assert_close(torch.cat(got), alone(layer, docs[0]), **TOL)
    plain = build(kind)
    plain.load_state_dict(layer.state_dict())
    assert not torch.allclose(alone(plain, docs[0]), alone(layer, docs[0]))


@pytest.mark.parametrize("kind", ["path_attention", "selective_attention"])
def test_mixers_that_read_backwards_only_stay_causal_under_a_full_mask(kind: str) -> None:
    settings = {} if kind == "selective_attention" else {"rank": 3}
    layer, (x,) = build(kind, **settings), documents(6)
    assert layer.caps.causal and not layer.caps.bidirectional
    if kind == "path_attention":
        full = layer(x[None], Ctx(Layout.plain(1, 6), Full())).y[0]
        torch.testing.assert_close(full, alone(layer, x), **TOL)


def test_logits_grow_with_log_n_beyond_the_trained_length_only() -> None:
    none = {"kind": "none", "trained": 4}
    layer, (x,) = build("attention", qk_norm=False, position=none), documents(9)
    q, k, v = heads(x @ layer.qkv.weight.T, 2, 2, 2)
    n = torch.arange(1, 10).double()[:, None]
    logits = q @ k.mT * 8**-0.5 * (n.log() / math.log(4)).clamp_min(1)
    expected = merged(causal_softmax(logits) @ v) @ layer.out.weight.T
    torch.testing.assert_close(alone(layer, x), expected, **TOL)


@pytest.mark.parametrize("name", ["swan", "masformer"])
def test_layers_of_a_backbone_have_their_own_spans(name: str) -> None:
    config = BACKBONES.parse(yaml_config.read(f"backbone/{name}"))
    words = config.words()
    window = {"swan_local": 512, "local_attention": 1024}
    with torch.device("meta"):
        stack = config.build(D)
    for word, block in zip(words, stack.layers, strict=True):
        reach = window.get(word)
        assert block.mixer.window == reach
        kept = min(5000, reach or 5000)
        assert block.mixer.state_bytes(1, 5000) == kept * (2 * D * 4 + 12) + 8
    assert {w in window for w in words} == {True, False}


def test_a_window_as_long_as_the_document_is_full_attention() -> None:
    wide, full, (x,) = build("attention", window=9), build("attention"), documents(9)
    full.load_state_dict(wide.state_dict())
    torch.testing.assert_close(alone(wide, x), alone(full, x), **TOL)


def places(*axes: list[int]) -> Fields:
    position = torch.tensor(axes, dtype=torch.int32).T[None]
    zero = torch.zeros_like(position[..., 0])
    return Fields(position, zero + 1, zero)


@pytest.mark.parametrize("ladder", ["joint", "own"])
def test_rope_axes_rotates_each_section_by_its_axis(ladder: str) -> None:
    rope = POSITIONS.get("rope_axes")(axes=[1, 2], pairs=[2, 2], ladder=ladder).build(8)
    f = places([0, 1, 2], [5, 0, 3], [0, 7, 2])
    x = torch.randn(1, 3, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = rope.apply(x, rope.prepare(f))
    speed = [1.0, 10.0**-1, 10.0**-2, 10.0**-3] if ladder == "joint" else [1.0, 10.0**-2] * 2
    for t in range(3):
        for i in range(4):
            turn = torch.tensor(float(f.position[0, t, 1 + i // 2]) * speed[i]).double()
            z = torch.complex(x[0, t, 0, i], x[0, t, 0, i + 4]) * torch.exp(1j * turn)
            pair = torch.stack((z.real, z.imag))
            torch.testing.assert_close(got[0, t, 0, [i, i + 4]], pair, rtol=1e-6, atol=1e-6)


def test_rope_axes_with_one_axis_or_missing_ones_is_rope() -> None:
    f, x = places([0, 4, 9]), torch.randn(1, 3, 2, 8, dtype=torch.float64)
    rope = POSITIONS.get("rope")().build(8)
    for axes in ([0], [0, 1, 2], [1, 2]):
        other = POSITIONS.get("rope_axes")(axes=axes).build(8)
        torch.testing.assert_close(other.apply(x, other.prepare(f)), rope.apply(x, rope.prepare(f)))
    with pytest.raises(ValueError, match="must sum to head_dim / 2"):
        POSITIONS.get("rope_axes")(axes=[0, 1], pairs=[1, 1]).build(8)


def test_a_hierarchy_of_places_never_turns_further_than_its_longest_level() -> None:
    """HiRoPE: 16 functions of 8 tokens turn no pair by more than 16 places, rope by 128."""
    inside, outer = list(range(8)) * 16, [i // 8 for i in range(128)]
    f = places(list(range(128)), inside, outer)
    rope = POSITIONS.get("rope_axes")(axes=[1, 2]).build(8)
    cos, sin = rope.prepare(f)[:, 0, :, 0]
    speed = 10000.0 ** -(torch.arange(4) / 4)
    far = torch.stack([torch.tensor(inside)] * 2 + [torch.tensor(outer)] * 2, -1)
    torch.testing.assert_close(torch.atan2(sin, cos), torch.remainder(
        far * speed + math.pi, 2 * math.pi) - math.pi, rtol=1e-4, atol=1e-4)  # fmt: skip
    assert int(far.max()) < 16
