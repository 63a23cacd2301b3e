"""A batch in slices: every token, target and place once; what goes on over their ends is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm.batch import Batch, Values
from mm.config import validate
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.fill import fill
from mm.model.layer import init_weights
from mm.registry import ADAPTERS
from mm.run import EngineConfig
from mm.shard import Shard
from mm.trainer.sequence import SequenceGroup, data_ranks

ROWS = [[Doc(5), Doc(4), Doc(3)], [Doc(12)], [Doc(6), Doc(2)]]


def batch(T: int = 12) -> Batch:
    layout = Layout.from_rows(ROWS, T)
    B = len(ROWS)
    ids = torch.arange(B * T, dtype=torch.int32).view(B, T, 1)
    real = layout.fields.document > 0
    weight = (real & (ids[..., 0] % 3 > 0)).float()
    goal = real.int() * (1 + ids[..., 0] % 2)
    return Batch(
        layout,
        ids,
        torch.where(real[..., None], ids + 1, -1),
        weight,
        {"tokens": weight.flatten().nonzero()[:, 0].int()},
        labels={"target_modality": goal},
    )


def slices(whole: Batch, size: int) -> list[Batch]:
    return [SequenceGroup(rank, size, None).split(whole) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_slices_hold_every_token_and_place_once(size: int) -> None:
    """Rows of 12 are padded for 5 processes; the target of a slice's last token stays its own."""
    whole = batch()
    parts = slices(whole, size)
    for name in ("ids", "targets", "weight"):
        joined = torch.cat([getattr(p, name) for p in parts], 1)
        assert torch.equal(joined[:, :12], getattr(whole, name)), name
        assert (joined[:, 12:] == (0 if name == "weight" else -1)).all()
    for name in ("position", "modality"):
        joined = torch.cat([getattr(p.layout.fields, name) for p in parts], 1)
        assert torch.equal(joined[:, :12], getattr(whole.layout.fields, name)), name
    chosen = [p.ids.flatten()[p.places["tokens"].long()] for p in parts]
    expected = whole.ids.flatten()[whole.places["tokens"].long()]
    assert torch.equal(torch.cat(chosen).sort().values, expected.sort().values)
    for p in parts:  # places keep their targets, weights and labels
        at = p.places["tokens"].long()
        assert torch.equal(p.targets.flatten()[at], p.ids.flatten()[at] + 1)
        assert (p.weight.flatten()[at] > 0).all()
        goal = 1 + p.ids.flatten()[at] % 2
        assert torch.equal(p.labels["target_modality"].flatten()[at], goal)


def test_what_is_no_token_of_a_row_is_refused_by_name() -> None:
    whole = batch()
    items = replace(whole, values={"image": Values.items(torch.zeros(1, 4, 2))})  # not full
    parts = replace(whole, parts={"source": whole})
    labels = replace(whole, labels={"class": torch.zeros(5)})
    for given, name in ((items, "image"), (labels, "class"), (parts, "source")):
        with pytest.raises(UserError, match=f"engine.sequence 2: '{name}' of a batch is no token"):
            slices(given, 2)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_values_fill_their_places_in_every_slice(size: int) -> None:
    """Items that lie over the ends of slices, and rows that are padded; gradients add up."""
    whole = batch()
    data = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1))
    n = torch.tensor([4, 5, 2], dtype=torch.int32)
    place = torch.tensor([0, 12 + 3, 24 + 5], dtype=torch.int32)
    whole = replace(whole, values={"image": Values(data, n, place, n, is_full=True)})
    adapters = nn.ModuleDict({"image": ADAPTERS.parse({"kind": "linear", "d_in": 2}).build(3)})
    init_weights(adapters)
    weight = adapters["image"].get_parameter("weight")

    def filled(b: Batch) -> tuple[Tensor, Tensor]:
        ctx = Ctx(b.layout, Causal(), b.ids, shard=b.shard)
        x, after = fill(torch.zeros(*b.ids.shape[:2], 3), b, ctx, adapters, None, {})  # type: ignore[arg-type]
        assert after is ctx
        (grad,) = torch.autograd.grad((x * b.ids).sum(), weight)
        return x.detach(), grad

    x, grad = filled(whole)
    assert (x != 0).any(-1).sum() == 11
    each = [filled(part) for part in slices(whole, size)]
    assert torch.equal(torch.cat([y for y, _ in each], 1)[:, :12], x)
    assert torch.allclose(torch.stack([g for _, g in each]).sum(0), grad, rtol=1e-5)


def test_documents_of_a_slice_and_what_crosses_its_ends() -> None:
    one, two, three = (p.shard for p in slices(batch(), 3))
    assert one is not None and two is not None and three is not None
    # The rows in thirds: 5 + 4 + 3 tokens; 12; 6 + 2 and padding.
    assert two.passes.tolist() == [[False] * 3, [False, True, False], [False, True, False]]
    assert one.head is None and one.begins and three.begins
    assert two.head is not None and three.head is not None
    # Row 0 goes on for one token in the second slice and one in the third; row 2 for two.
    assert (two.head.fields.document > 0).sum(1).tolist() == [1, 4, 2]
    assert (three.head.fields.document > 0).sum(1).tolist() == [1, 4, 0]
    assert two.earlier.tolist() == [4, 4, 4] and three.earlier.tolist() == [3, 8, 0]
    assert (two.tail.fields.document > 0).sum(1).tolist() == [3, 4, 2]
    assert (three.tail.fields.document > 0).sum(1).tolist() == [3, 4, 0]
    assert two.before(two.whole.fields.document, 2).tolist() == [[1, 1], [4, 4], [5, 5]]
    assert one.before(one.whole.fields.document, 2).tolist() == [[0, 0]] * 3


def test_a_slice_that_a_document_of_one_token_before_it_fills() -> None:
    """Rows in halves: a document that begins on the last place before; two; one and padding."""
    whole = Layout.from_rows([[Doc(3), Doc(5)], [Doc(4), Doc(2)], [Doc(6)]], 8)
    first, second = (Shard.of(whole, rank, 2)[0] for rank in (0, 1))
    passes = [[False] * 3, [True, False, False]]
    assert first.passes.tolist() == second.passes.tolist() == passes
    assert second.earlier.tolist() == [1, 0, 4] and first.earlier.tolist() == [0, 0, 0]
    assert first.head is None and second.head is not None
    assert second.head.fields.document.tolist() == [[1] * 4, [0] * 4, [3, 3, 0, 0]]
    assert second.head.fresh.tolist() == [False, True, False]
    assert second.tail.fields.document.tolist() == [[1] * 4, [0] * 4, [0] * 4]
    assert second.tail.fresh.tolist() == [False, True, True]
    assert first.tail.fields.document.tolist() == [[0, 0, 0, 1], [2] * 4, [3] * 4]
    assert first.tail.cu_seqlens.tolist() == [3, 4, 8, 12] and first.tail.max_seqlen == 4
    assert (first.begins, first.through, first.alone) == (True, False, False)
    assert (second.begins, second.through, second.alone) == (True, True, False)


def test_documents_of_a_slice_are_laid_out_as_any() -> None:
    """Numbers, first places and the longest one are those that `Layout.from_rows` gives."""
    _, own = Shard.of(batch().layout, 1, 3)
    expected = Layout.from_rows([[Doc(1), Doc(3)], [Doc(4)], [Doc(2), Doc(2)]], 4, 6)
    assert torch.equal(own.fields.document, expected.fields.document)
    assert torch.equal(own.cu_seqlens, expected.cu_seqlens)
    assert own.max_seqlen == expected.max_seqlen and (own.slot == -1).all()


def test_a_length_that_does_not_divide_is_no_shard() -> None:
    with pytest.raises(ValueError, match="12 tokens do not divide over 5"):
        Shard.of(batch().layout, 0, 5)


@pytest.mark.parametrize(("rank", "mine"), [(0, (0, 3)), (1, (0, 3)), (4, (2, 3)), (5, (2, 3))])
def test_processes_that_share_rows_read_the_same_ones(
    rank: int, mine: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", str(rank))
    assert data_ranks(2)[:2] == mine
    with pytest.raises(UserError, match=r"engine.sequence 4 does not divide 6 .*\[1, 2, 3, 6\]"):
        data_ranks(4)


@pytest.mark.parametrize("value", [0, -1, 1025, "two"])
def test_a_number_of_processes_that_is_none(value: Any) -> None:
    with pytest.raises(UserError, match="sequence"):
        validate(EngineConfig, {"sequence": value}, "engine")
