"""Positions against their formulas written out, and the weights that they begin with."""

from __future__ import annotations

import math

import pytest
import torch

from mm.layout import Layout
from mm.registry import POSITIONS


def test_tables_begin_small_and_factors_begin_at_one() -> None:
    torch.manual_seed(0)
    learned = POSITIONS.get("learned")(max_length=512).build(8, 1, 64)
    learned.init_weights()
    assert float(learned.table.detach().std()) == pytest.approx(0.02, rel=0.1)
    tempered = POSITIONS.get("none")(temperature=True).build(8, 4)
    with torch.no_grad():
        tempered.temperature.fill_(7.0)
    tempered.init_weights()
    assert tempered.temperature.tolist() == [1.0] * 4


@pytest.mark.parametrize("D", [8, 7])
def test_sinusoids_are_the_paper_s(D: int) -> None:
    """Vaswani et al. 2017 (arXiv:1706.03762), section 3.5: sin and cos of pos / theta^(2i / D)."""
    theta = 100.0
    x = torch.zeros(1, 5, D, dtype=torch.float64)
    y = POSITIONS.get("sinusoidal")(theta=theta).build(8).embed(x, Layout.plain(1, 5).fields)
    for place in range(5):
        for d in range(D):
            angle = place / theta ** ((d - d % 2) / D)
            want = math.cos(angle) if d % 2 else math.sin(angle)
            assert float(y[0, place, d]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("both_ways", [False, True])
def test_urpe_has_one_gain_a_distance_and_a_direction(both_ways: bool) -> None:
    """Luo et al. 2022 (arXiv:2205.13401): c of query minus key; far ones share the last."""
    far, T = 3, 6
    urpe = POSITIONS.get("urpe")(both_ways=both_ways, buckets=4, max_distance=far).build(8, 2)
    assert urpe.toeplitz.shape == (2 * far if both_ways else far, 2)
    with torch.no_grad():
        urpe.toeplitz.copy_(torch.arange(urpe.toeplitz.numel()).view(-1, 2))
        urpe.table.zero_()
    f = Layout.plain(1, T).fields
    spec = urpe.scores(torch.zeros(1, T, 2, 8), f, f)
    gain = spec.gain_RHTS
    for i in range(T):
        for j in range(T):
            row = min(abs(i - j), far - 1) + (far if both_ways and j > i else 0)
            assert gain[0, :, i, j].tolist() == [2 * row, 2 * row + 1], (i, j)
    late = f.map(lambda x: x[:, 4:])  # two queries, as when a text is gone on with
    later = urpe.scores(torch.zeros(1, 2, 2, 8), late, f).gain_RHTS
    assert torch.equal(later, gain[:, :, 4:])


def test_relative_buckets_of_no_distance_are_exact() -> None:
    """Raffel et al. 2019 (arXiv:1910.10683): half the buckets are distances, 0 among them."""
    bias = POSITIONS.get("t5_bias")(buckets=8, max_distance=32).build(8, 1)
    with torch.no_grad():
        bias.table.copy_(torch.arange(8.0)[:, None])
    f = Layout.plain(1, 41).fields
    score = bias.score(torch.zeros(1, 41, 1, 8), f, f)[0, 0]
    assert score.isfinite().all()
    row = score[40].flip(0).tolist()  # by distance from 0
    want = [
        min(d, 4) if d < 4 else min(4 + int(math.log(d / 4) / math.log(8) * 4), 7)
        for d in range(41)
    ]
    assert row == want


def test_randomised_times_are_drawn_of_the_whole_range() -> None:
    """Ruoss et al. 2023 (arXiv:2305.16843): n of L times, in order, without repetition."""
    from mm.mask import Causal
    from mm.model.context import Ctx

    made = POSITIONS.get("randomised")(length=6).build(8, 1)
    layout = Layout.plain(1, 3)
    seen = set()
    for seed in range(1, 200):
        ids = made.ids(layout.fields, Ctx(layout, Causal(), seed=seed))[0, :, 0].tolist()
        assert ids == sorted(set(ids)) and len(ids) == 3
        seen |= {*ids}
    assert seen == set(range(6))
    assert torch.equal(
        made.ids(layout.fields, Ctx(layout, Causal(), seed=0)), layout.fields.position
    )


def test_drawn_times_leave_the_other_axes_as_they_are() -> None:
    from mm.mask import Causal
    from mm.model.context import Ctx

    layout = Layout.plain(1, 3)
    f = layout.fields._replace(position=torch.arange(9, dtype=torch.int32).view(1, 3, 3) % 3)
    ids = POSITIONS.get("randomised")(length=6).build(8, 1).ids(f, Ctx(layout, Causal(), seed=3))
    assert ids.shape == f.position.shape and torch.equal(ids[..., 1:], f.position[..., 1:])


def test_a_position_without_a_shared_table_turns_by_the_fields_it_is_given() -> None:
    """Those with drawn times where there are some, else those of the call."""
    from mm.layout import Fields
    from mm.mask import Causal
    from mm.model.context import Ctx
    from mm.model.positions.base import Position

    class Adds(Position):
        def rotate(self, q, k, fq: Fields, fk: Fields):  # type: ignore[no-untyped-def]
            return q + fq.position[..., None], k + fk.position[..., None]

    layout = Layout.plain(1, 3)
    ctx, x = Ctx(layout, Causal()), torch.zeros(1, 3, 1, 1)
    drawn = layout.fields._replace(position=layout.fields.position * 10)
    for fields, factor in ((None, 1), (drawn, 10)):
        for y in Adds().rotate_call(ctx, x, x, fields):
            assert y.flatten().tolist() == [0, factor, 2 * factor]


@pytest.mark.parametrize("kind", ["learned", "grid"])
def test_learned_places_of_no_token_are_none(kind: str) -> None:
    made = POSITIONS.get(kind)().build(8, 1, 4)
    made.init_weights()
    f = Layout.plain(1, 2).fields.map(lambda x: x[:, :0])
    assert made.embed(torch.zeros(1, 0, 4), f).shape == (1, 0, 4)


def test_a_position_that_is_added_is_told_the_width_of_the_model() -> None:
    """One of one's own may look at ``d_model`` alone."""
    from mm.config import Config
    from mm.model.positions.learned import Learned
    from mm.model.positions.randomised import build_added

    class Wide(Config):
        kind: str = "wide"

        def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> Learned:
            return Learned(d_model, 4)

    made = build_added(Wide(), 6)
    assert isinstance(made, Learned) and made.table.shape == (4, 6)
