"""Positions against their formulas and the oracles of `transformers`.

The laws run them inside attention: test_contract.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from laws import VOCABULARY, D, alone, documents
from torch import Tensor

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Fields, Grid, Layout
from mm.mask import Causal, Full
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.positions.alibi import slopes
from mm.model.positions.t5_bias import bucket
from mm.registry import EMBEDDERS, MIXERS, NETWORKS, POSITIONS


def fields(*places: int) -> Fields:
    at = torch.tensor(places, dtype=torch.int32)[None]
    return Fields(at[..., None], torch.ones_like(at), torch.zeros_like(at))


def scores(kind: str, heads: int, fq: Fields, fk: Fields, **settings: Any) -> Tensor:
    position = POSITIONS.get(kind)(**settings).build(8, heads=heads, d_model=8 * heads)
    if isinstance(position, torch.nn.Module):
        torch.manual_seed(0)
        init_weights(position)
    return position.score(torch.zeros(1, fq.document.shape[1], heads, 8), fq, fk)


# ---- ALiBi ----


def test_alibi_slopes_are_the_papers() -> None:
    assert slopes(8) == [2.0**-h for h in range(1, 9)]
    assert slopes(1) == [2.0**-8]
    # The authors' rule for 12 heads: those of 8, then every second one of 16.
    assert slopes(12) == slopes(8) + slopes(16)[0::2][:4]
    assert all(len(slopes(n)) == n for n in range(1, 40))


def test_alibi_bias_is_linear_in_the_distance_whatever_the_offset() -> None:
    bias = scores("alibi", 2, fields(5, 9), fields(2, 5, 9, 12))
    assert bias.shape == (1, 2, 2, 4)
    distance = torch.tensor([[3.0, 0, 4, 7], [7, 4, 0, 3]])
    expected = torch.stack((-distance / 16, -distance / 256))
    torch.testing.assert_close(bias[0], expected)
    torch.testing.assert_close(
        scores("alibi", 2, fields(105, 109), fields(102, 105, 109, 112))[0], expected
    )


# ---- T5 ----


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("buckets,most", [(32, 128), (8, 20), (64, 1000)])
def test_t5_buckets_equal_those_of_the_peer(both_ways: bool, buckets: int, most: int) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-300, 301)
    got = bucket(distance, buckets, most, both_ways)
    expected = t5.T5Attention._relative_position_bucket(-distance, both_ways, buckets, most)
    assert torch.equal(got, expected)


def test_t5_buckets() -> None:
    got = bucket(torch.tensor([-5, 0, 1, 15, 16, 17, 31, 32, 64, 127, 128, 10**6]), 32, 128, False)
    # 16 exact ones, then 16 for a factor of 8: a doubling is 16 / 3 buckets.
    assert got.tolist() == [0, 0, 1, 15, 16, 16, 21, 21, 26, 31, 31, 31]
    both = bucket(torch.tensor([0, 7, 8, 200, -1, -7, -200]), 32, 128, True)
    assert both.tolist() == [0, 7, 8, 15, 17, 23, 31]
    assert (bucket(torch.arange(10**4), 32, 128, False).diff() >= 0).all()


def test_t5_bias_is_the_table_and_every_bucket_learns() -> None:
    position = POSITIONS.get("t5_bias")(buckets=8, max_distance=16).build(4, heads=3)
    init_weights(position)
    f = fields(*range(40))
    bias = position.score(torch.zeros(1, 40, 3, 4), f, f)
    table = position.table
    assert torch.equal(bias[0, :, 2, 0], table[2]) and torch.equal(bias[0, :, 39, 0], table[7])
    (grad,) = torch.autograd.grad(bias.sum(), table)
    assert (grad > 0).all()
    with pytest.raises(ValueError, match="max_distance"):
        POSITIONS.get("t5_bias")(buckets=32, max_distance=16).build(4)


# ---- absolute ones ----


def test_sinusoidal_is_the_papers_table() -> None:
    position, x = POSITIONS.get("sinusoidal")().build(6), torch.zeros(1, 2, 6, dtype=torch.float64)
    got = position.embed(x, fields(0, 7))
    assert got[0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    expected = [g(7 / 10000 ** (2 * i / 6)) for i in range(3) for g in (math.sin, math.cos)]
    torch.testing.assert_close(got[0, 1], torch.tensor(expected, dtype=torch.float64))
    assert position.embed(torch.zeros(1, 1, 5), fields(3)).shape == (1, 1, 5)


def test_learned_refuses_places_beyond_its_table() -> None:
    position = POSITIONS.get("learned")(max_length=4).build(3, heads=2)
    init_weights(position)
    x = torch.randn(1, 2, 6)
    assert torch.equal(position.embed(x, fields(3, 0)), x + position.table[[3, 0]])
    with pytest.raises(ValueError, match="position 4 lies beyond the 4 learned ones"):
        position.embed(x, fields(1, 4))
    assert not MIXERS.get("attention")(position="learned").build(D).caps.length_general
    assert MIXERS.get("attention")().build(D).caps.length_general


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_absolute_positions_belong_to_the_embedder_too(kind: str) -> None:
    """The classical place; they restart with each document and continue in a State."""
    embedder = EMBEDDERS.get("sum")(position=kind).build(11, D)
    init_weights(embedder)
    plain = EMBEDDERS.get("sum")().build(11, D)
    plain.load_state_dict({"weight": embedder.weight})
    ids = torch.randint(0, 11, (1, 6, 1))
    layout = Layout.from_rows([[Doc(4), Doc(2)]])
    ctx = Ctx(layout, Causal())
    added = embedder(ids, ctx).y - plain(ids, ctx).y
    torch.testing.assert_close(added[0, 4:], added[0, :2])
    assert (added[0, 0] - added[0, 1]).abs().max() > 1e-3
    later = Ctx(Layout.from_rows([[Doc(1, start=3)]]), Causal())
    torch.testing.assert_close(embedder(ids[:, 3:4], later).y, embedder(ids, ctx).y[:, 3:4])


@pytest.mark.parametrize(
    "position", ["rope", {"kind": "none", "temperature": True}, {"kind": "none", "trained": 8}]
)
def test_the_embedder_refuses_positions_that_belong_to_a_mixer(position: Any) -> None:
    with pytest.raises(ValueError, match="adds nothing to embeddings: it belongs to a mixer"):
        EMBEDDERS.get("sum")(position=position).build(11, D)


def test_temperatures_and_growth_with_length_multiply_the_queries() -> None:
    """By hand: a factor of each head, and log n / log 4 from the fifth token on."""
    position = POSITIONS.get("none")(temperature=True, trained=4).build(3, heads=2)
    with torch.no_grad():
        position.temperature.copy_(torch.tensor([0.5, 3.0]))
    q, f = torch.randn(1, 4, 2, 3), fields(0, 3, 7, 15)
    got, k = position.rotate(q, q, f, f)
    growth = [1, 1, math.log(8) / math.log(4), 2]
    factor = torch.tensor([[g * h for h in (0.5, 3.0)] for g in growth])
    torch.testing.assert_close(got, q * factor[..., None])
    assert torch.equal(k, q)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_a_model_with_absolute_positions_steps_as_it_reads(kind: str) -> None:
    base = NETWORKS.get("lm").smallest().model_dump()
    base["embedder"] = {"kind": "sum", "position": kind}
    torch.manual_seed(0)
    model = NETWORKS.parse(base).build(VOCABULARY)
    init_weights(model)
    model.double()
    ids = torch.randint(VOCABULARY.size, (1, 6))
    whole = model(Batch.of_ids(ids), loss=False).heads["tokens"].dist.logits
    state = model.initial_state(1, 6)
    with torch.no_grad():
        for t in range(6):
            layout = Layout.from_rows([[Doc(1, slot=0, fresh=t == 0, start=t)]])
            out = model(Batch.of_ids(ids[:, t : t + 1], layout), state=state, loss=False)
            state = out.state
            torch.testing.assert_close(out.heads["tokens"].dist.logits[0], whole[t])


@pytest.mark.parametrize("kind", sorted(set(POSITIONS) - {"none", "grid"}))  # grid: its cells alone
def test_every_position_tells_orders_apart(kind: str) -> None:
    """Without one, attention to everything gives the last token the same, however the rest lies."""
    layer = MIXERS.get("attention")(heads=2, position=kind).build(D)
    torch.manual_seed(1)
    init_weights(layer)
    layer.double()
    (doc,) = documents(7)
    turned = doc[[2, 1, 0, 3, 4, 5, 6]]
    assert (alone(layer, doc)[-1] - alone(layer, turned)[-1]).abs().max() > 1e-4
    if kind in ("alibi", "t5_bias", "rope"):  # relative: shifting all places changes nothing
        shifted = Layout.from_rows([[Doc(7, start=50)]])
        y = layer(doc[None], Ctx(shifted, Full())).y
        torch.testing.assert_close(
            y, layer(doc[None], Ctx(Layout.plain(1, 7), Full())).y, rtol=1e-5, atol=1e-6
        )


# ---- scaling rules of RoPE ----


def angles(dim: int, theta: float, **scaling: Any) -> tuple[Tensor, Tensor]:
    """Angles a place, and the length of the rotated."""
    position = POSITIONS.get("rope")(theta=theta, scaling=scaling or None).build(dim)
    cos, sin = position.prepare(fields(1))[:, 0, 0, 0].double()
    return torch.atan2(sin, cos), (cos.square() + sin.square()).sqrt()


@pytest.mark.parametrize(
    "rule,peer",
    [
        ({"rule": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rule": "yarn", "factor": 8.0, "original": 512},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
        ),
        (
            {"rule": "yarn", "factor": 3.0, "original": 4096, "low": 2.0, "high": 16.0},
            {
                "rope_type": "yarn",
                "factor": 3.0,
                "original_max_position_embeddings": 4096,
                "beta_slow": 2.0,
                "beta_fast": 16.0,
            },
        ),
        (
            {"rule": "llama3", "factor": 8.0, "original": 1024},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 1024,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
    ],
    ids=["linear", "yarn", "yarn with other corners", "llama3"],
)
@pytest.mark.parametrize("dim,theta", [(64, 10000.0), (128, 500000.0)])
def test_scaling_rules_equal_those_of_the_peer(
    rule: dict[str, Any], peer: dict[str, Any], dim: int, theta: float
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": theta, **peer},
    )
    speed, length = ROPE_INIT_FUNCTIONS[peer["rope_type"]](config, torch.device("cpu"))
    got, radius = angles(dim, theta, **rule)
    torch.testing.assert_close(got, speed.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(radius, torch.full_like(radius, length), rtol=1e-5, atol=1e-6)


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor() -> None:
    plain, _ = angles(32, 10000.0)
    scaled, radius = angles(32, 10000.0, rule="ntk", factor=4.0)
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 4, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(radius, torch.ones_like(radius))


@pytest.mark.parametrize("rule", ["linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_one_is_plain_rope(rule: str) -> None:
    got, radius = angles(32, 10000.0, rule=rule, factor=1.0)
    torch.testing.assert_close(got, angles(32, 10000.0)[0])
    torch.testing.assert_close(radius, torch.ones_like(radius))


def test_scaled_and_plain_layers_share_no_table() -> None:
    keys = {
        POSITIONS.get("rope")(scaling=s).build(8).key
        for s in (None, {"rule": "linear", "factor": 2}, {"rule": "yarn", "factor": 2})
    }
    assert len(keys) == 3
    with pytest.raises(ValueError, match="must exceed low"):
        POSITIONS.get("rope")(scaling={"rule": "yarn", "factor": 2, "low": 4, "high": 2}).build(8)


# ---- randomised positions ----


def test_randomised_positions_are_sorted_distinct_shared_and_of_training_only() -> None:
    layout = Layout.from_rows([[Doc(5), Doc(3)], [Doc(7)]])
    position = POSITIONS.get("randomised")(length=20).build(8)
    draw = lambda seed: position.ids(layout.fields, Ctx(layout, Causal(), seed=seed))[..., 0]
    long, short = draw(3)[1, :7], draw(3)[0]
    assert (long[1:] > long[:-1]).all() and 0 <= long.min() and long.max() < 20
    assert torch.equal(short[:5], long[:5]) and torch.equal(short[5:8], long[:3])
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(draw(0), layout.fields.position[..., 0])
    with pytest.raises(UserError, match="raise length"):
        POSITIONS.get("randomised")(length=6).build(8).ids(
            layout.fields, Ctx(layout, Causal(), seed=1)
        )


@pytest.mark.parametrize("inner", ["rope", "alibi", "learned"])
def test_attention_with_randomised_positions_reads_the_drawn_ones(inner: str) -> None:
    """It equals the inner position on a layout that holds them; a window stays one of tokens."""
    torch.manual_seed(0)
    settings = {"heads": 2, "window": 4}
    drawn = MIXERS.get("attention")(position={"kind": "randomised", "inner": inner}, **settings)
    layer = drawn.build(16)
    init_weights(layer)
    plain = MIXERS.get("attention")(position=inner, **settings).build(16)
    plain.load_state_dict({k.replace("inner.", ""): v for k, v in layer.state_dict().items()})
    x = torch.randn(2, 9, 16)
    layout = Layout.plain(2, 9)
    ctx = Ctx(layout, Causal(), seed=5)
    ids = layer.position.ids(layout.fields, ctx)
    assert ids.max() > 100
    f = layout.fields._replace(position=ids)
    window = (torch.arange(9)[:, None] - torch.arange(9)).clamp_min(0) < 4
    allowed = window & torch.ones(9, 9, dtype=torch.bool).tril()
    q, k, v = plain.qkv(plain.position.embed(x, f), ctx).view(2, 9, 6, 8).split(2, 2)
    q, k = plain.position.rotate(plain.q_norm(q), plain.k_norm(k), f, f)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 8**-0.5
    bias = plain.position.score(q, f, f)
    scores = scores if bias is None else scores + bias
    shares = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = plain.out(torch.einsum("bhts,bshk->bthk", shares, v).flatten(2), ctx)
    torch.testing.assert_close(layer(x, ctx).y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x, ctx).y, plain(x, ctx).y)


@pytest.mark.parametrize("kind", ["linear_attention", "kv_shift", "mega", "combiner"])
def test_mixers_that_would_not_draw_refuse_randomised_positions(kind: str) -> None:
    with pytest.raises(UserError, match="drawn"):
        MIXERS.get(kind)(position="randomised").build(16)


def test_the_cells_of_a_grid_have_learned_places_wherever_it_stands() -> None:
    position = POSITIONS.get("grid")(axes=2, max_cells=9).build(D)
    init_weights(position)
    shape = (2, 3)
    doc = Doc(16, grids=(Grid(2, shape), Grid(9, shape)))
    f = Layout.from_rows([[doc]], axes=3).fields
    added = position.embed(torch.zeros(1, 16, D), f)[0]
    torch.testing.assert_close(added[2:8], added[9:15])
    cells = torch.cdist(added[2:8], added[2:8]) + 9 * torch.eye(6)
    assert cells.min() > 1e-3  # no two cells alike
    for outside in (slice(0, 2), slice(8, 9), slice(15, 16)):
        assert not added[outside].any()
    large = Layout.from_rows([[Doc(16, grids=(Grid(0, (4, 4)),))]], axes=3).fields
    with pytest.raises(ValueError, match="more than the 9 cells"):
        position.embed(torch.zeros(1, 16, D), large)
    text = Layout.plain(1, 4).fields  # one axis: no grid anywhere
    assert not position.embed(torch.zeros(1, 4, D), text).any()
