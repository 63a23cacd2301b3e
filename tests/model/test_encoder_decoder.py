"""Encoder-decoder and cross-attention: who reaches whom, what is run when, torch's own layer."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from model_toys import ids, make
from torch import Tensor, nn

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal, Full
from mm.model.context import Ctx, Memory
from mm.model.layer import init_weights
from mm.registry import ADAPTERS, BLOCKS, FFNS, MIXERS

BACKBONE = {
    "kind": "encoder_decoder",
    "encoder": {"pattern": "attention", "mixers": {"attention": {"heads": 2}}},
    "decoder": {
        "pattern": "2*attention cross_attention",
        "mixers": {"attention": {"heads": 2}, "cross_attention": {"heads": 2}},
    },
}
GIVEN, T = 4, 9


def layout(slot: int = -1, start: int = 0, stop: int = T) -> Layout:
    marks = [1] * GIVEN + [0] * (T - GIVEN)
    doc = Doc(stop - start, extra={"prefix": marks[start:stop]}, slot=slot, fresh=not start)
    return Layout.from_rows([[doc._replace(start=start)]])


def test_conditions_see_each_other_and_what_follows_sees_them_and_its_past() -> None:
    model = make(backbone=BACKBONE).double()
    moved = torch.zeros(T, T, dtype=torch.bool)  # output t by input s
    base = ids(1, T)
    with torch.no_grad():
        y = model(Batch.of_ids(base, layout())).hidden[0]
        for s in range(T):
            changed = base.clone()
            changed[0, s] = (changed[0, s] + 1) % 20
            moved[:, s] = (model(Batch.of_ids(changed, layout())).hidden[0] != y).any(-1)
    wanted = torch.ones(T, T, dtype=torch.bool).tril()
    wanted[:GIVEN, :GIVEN] = True
    assert torch.equal(moved, wanted)


def test_the_encoder_runs_where_a_document_begins_and_never_again() -> None:
    model, runs = make(backbone=BACKBONE).double(), []
    encoder = cast(Any, model.backbone).encoder
    encoder.register_forward_hook(lambda m, args, out: runs.append(args[0].shape[1]))
    base = ids(1, T)
    with torch.no_grad():
        whole = model(Batch.of_ids(base, layout())).hidden[0]
        state, got = model.initial_state(1, T), []
        for start, stop in ((0, GIVEN + 1), *((t, t + 1) for t in range(GIVEN + 1, T))):
            batch = Batch.of_ids(base[:, start:stop], layout(0, start, stop))
            out = model(batch, state=state)
            state = out.state
            got.append(out.hidden[0])
    torch.testing.assert_close(torch.cat(got), whole, rtol=1e-9, atol=1e-10)
    assert runs == [T, GIVEN + 1]


def test_only_what_a_half_reads_is_in_its_rows() -> None:
    """Rows of 512 of which 100 are conditions cost the encoder 128 columns, the decoder 448."""
    model, widths = make(backbone=BACKBONE), []
    halves = cast(Any, model.backbone)
    for half in (halves.encoder, halves.decoder):
        half.register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
    doc = Doc(512, extra={"prefix": [1] * 100 + [0] * 412})
    model(Batch.of_ids(ids(1, 512), Layout.from_rows([[doc]])))
    assert widths == [128, 448]


def test_a_second_sequence_of_the_batch_is_attended_to_by_name() -> None:
    """Packed = separate, and served: the part comes where its document begins, and never again."""
    words = {"word": {"kind": "cross_attention", "heads": 2, "memory": "notes"}}
    mixers = {"attention": {"heads": 2}, **words}
    backbone = {"kind": "stack", "pattern": "attention word", "mixers": mixers}
    model = make(backbone=backbone, parts=["notes"]).double()

    def batch(rows: list[list[tuple[int, int]]], slot: int = -1) -> Batch:
        """Documents of a length each with notes of another, the ids by these numbers."""
        lay = lambda n: Layout.from_rows([[Doc(d[n], slot=slot) for d in row] for row in rows])
        fill = lambda n: torch.cat([ids(1, d[n], seed=sum(d)) for row in rows for d in row], 1)
        notes = Batch.of_ids(fill(1), lay(1))
        return dataclasses.replace(Batch.of_ids(fill(0), lay(0)), parts={"notes": notes})

    with torch.no_grad():
        both = model(batch([[(5, 3), (4, 6)]])).hidden[0]
        first, second = (model(batch([[d]])).hidden[0] for d in ((5, 3), (4, 6)))
        torch.testing.assert_close(both, torch.cat((first, second)), rtol=1e-9, atol=1e-10)
        other = model(batch([[(5, 4)]])).hidden[0]
        assert not torch.equal(other[0], first[0])
        state, got = model.initial_state(1, 8), []
        whole = batch([[(5, 3)]], slot=0)
        for t in range(5):
            layout = Layout.from_rows([[Doc(1, slot=0, fresh=not t, start=t)]])
            parts = whole.parts if not t else {}
            step = dataclasses.replace(
                Batch.of_ids(whole.ids[:, t : t + 1, 0], layout), parts=parts
            )
            out = model(step, state=state)
            state = out.state
            got.append(out.hidden[0])
        torch.testing.assert_close(torch.cat(got), first, rtol=1e-9, atol=1e-10)


def test_cross_attention_is_torchs() -> None:
    D, H = 16, 4
    config = cast(Any, MIXERS.get("cross_attention"))(heads=H, qk_norm=False)
    layer = config.build(D)
    init_weights(layer)
    other = nn.MultiheadAttention(D, H, bias=False, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat((layer.q.weight, layer.kv.weight)))
        other.out_proj.weight.copy_(layer.out.weight)
    x, source = torch.randn(2, 5, D), torch.randn(2, 7, D)
    ctx = Ctx(
        Layout.plain(2, 5),
        Causal(),
        memories={"source": Memory(Layout.plain(2, 7), Full(), source)},
    )
    torch.testing.assert_close(layer(x, ctx).y, other(x, source, source)[0])


def test_gates_begin_closed_and_open_with_a_gradient() -> None:
    mixer = cast(Any, MIXERS.get("attention"))(heads=2).build(16)
    ffn = cast(Any, FFNS.get("swiglu"))(hidden=8).build(16)
    block = cast(Any, BLOCKS.get("gated"))().build(16, mixer, ffn)
    init_weights(block)
    x = torch.randn(1, 5, 16)
    y: Tensor = block(x, Ctx(Layout.plain(1, 5), Causal())).y
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert all(gate.grad is not None and gate.grad.abs() > 0 for gate in block.gates.values())


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ({"kind": "stack", "pattern": "cross_attention"}, "memory 'source', which nothing makes"),
        (BACKBONE | {"decoder": {"pattern": "attention"}}, "put cross_attention into its pattern"),
        (BACKBONE | {"encoder": {"pattern": "cross_attention"}}, "which the encoder makes"),
        (
            BACKBONE | {"decoder": {"pattern": "cross_attention", "ffns": {"attention": None}}},
            "ffns: 'attention' is no word of the pattern",
        ),
    ],
    ids=["no memory", "no reader", "of itself", "a word that is not there"],
)
def test_what_does_not_fit_is_refused_in_one_line(backbone: dict[str, Any], said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said) as error:
        make(backbone=backbone)
    assert "\n" not in str(error.value)


def test_an_encoder_adapter_refuses_layers_that_attend_to_a_memory() -> None:
    layers = {"kind": "stack", "pattern": "cross_attention", "depth": 1}
    config = {"kind": "encoder", "inner": {"kind": "linear", "d_in": 3}, "backbone": layers}
    with pytest.raises(UserError, match="adapter encoder, backbone: .*the memory 'source'"):
        ADAPTERS.parse(config).build(8)
