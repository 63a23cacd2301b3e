"""Gains after the softmax, positions on grids, parallel context and unpadded rows, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from laws import TOL, D, alone, apply, documents
from torch import Tensor

from mm.layout import Doc, Fields, Layout
from mm.mask import Causal, Full, ParallelBlocks, parallel_blocks
from mm.model.context import Ctx
from mm.model.ffn.swiglu import SwiGLU
from mm.model.layer import init_weights
from mm.model.length_buckets import LengthBuckets
from mm.model.mixers.attention.attention import Attention
from mm.model.positions.irpe import piecewise
from mm.registry import FFNS, MIXERS, POSITIONS


def build(**settings: Any) -> Attention:
    torch.manual_seed(5)
    layer = MIXERS.get("attention")(**{"heads": 2, "qk_norm": False, **settings}).build(D)
    init_weights(layer)
    return layer.double()


# ---- URPE ----


def test_urpe_is_a_toeplitz_matrix_times_the_softmax() -> None:
    layer, (x,) = build(position={"kind": "urpe", "max_distance": 20}), documents(30)
    plain = build(position={"kind": "t5_bias", "max_distance": 20})
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "toeplitz" not in k})
    torch.testing.assert_close(alone(layer, x), alone(plain, x), **TOL)  # gains begin as 1
    position: Any = layer.position
    with torch.no_grad():
        position.toeplitz.add_(torch.randn_like(position.toeplitz))
    q, k, v = (x @ layer.qkv.weight.T).view(30, 3, 2, 8).permute(1, 2, 0, 3)
    at = torch.arange(30)
    f = Fields(at[None, :, None], torch.ones_like(at)[None], torch.zeros_like(at)[None])
    logits = q @ k.mT * 8**-0.5 + position.score(q[None], f, f)[0]
    p = logits.masked_fill(at[:, None] < at, -math.inf).softmax(-1)
    table = position.toeplitz.T.tolist()
    gain = torch.tensor(
        [[[row[min(abs(i - j), 19)] for j in range(30)] for i in range(30)] for row in table],
        dtype=torch.float64,
    )
    y = ((p * gain) @ v).transpose(0, 1).flatten(1) @ layer.out.weight.T
    torch.testing.assert_close(alone(layer, x), y, **TOL)


def test_equal_tokens_tell_their_places_apart_only_with_gains() -> None:
    x = torch.ones(1, 12, D)
    target = torch.sin(torch.arange(12.0))[:, None].expand(-1, D)
    ctx = Ctx(Layout.plain(1, 12), Causal())
    spread, error = {}, {}
    for kind in ("t5_bias", "urpe"):
        layer = build(position=kind).float()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
        for _ in range(200):
            loss = (layer(x, ctx).y[0] - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        y = layer(x, ctx).y[0].detach()
        spread[kind] = (y.amax(0) - y.amin(0)).max().item()
        error[kind] = (y - target).square().mean().item()
    assert spread["t5_bias"] < 1e-5 and error["t5_bias"] > 0.3
    assert error["urpe"] < 1e-3, error


# ---- iRPE ----


def grid(rows: int, columns: int, row: int = 0, column: int = 0) -> Fields:
    """Fields of a raster of places that begins at a row and column."""
    r, c = torch.meshgrid(torch.arange(rows) + row, torch.arange(columns) + column, indexing="ij")
    position = torch.stack((torch.arange(rows * columns), r.flatten(), c.flatten()), -1)[None]
    one = torch.ones(1, rows * columns, dtype=torch.int32)
    return Fields(position.int(), one, torch.zeros_like(one))


def naive_index(x: float) -> int:
    """Equation 18 with alpha 1.9, beta 3, gamma 15."""
    if abs(x) <= 1.9:
        return round(x)
    far = round(1.9 + math.log(abs(x) / 1.9) / math.log(15 / 1.9) * 1.1)
    return int(math.copysign(min(3, far), x))


@pytest.mark.parametrize("method", ["euclidean", "quantization", "cross", "product"])
@pytest.mark.parametrize("mode", ["bias", "contextual"])
def test_irpe_is_the_papers_table_pair_by_pair(method: str, mode: str) -> None:
    position = POSITIONS.get("irpe")(method=method, mode=mode).build(6, heads=2)
    init_weights(position)
    position.double()
    f, q = grid(3, 5), torch.randn(1, 15, 2, 6, dtype=torch.float64)
    got = position.score(q, f, f)
    lengths = sorted({a * a + b * b for a in range(31) for b in range(31)})
    places = f.position[0, :, 1:].tolist()
    for i, (ri, ci) in enumerate(places):
        for j, (rj, cj) in enumerate(places):
            dr, dc = ri - rj, ci - cj
            terms = {
                "euclidean": [naive_index(round(math.hypot(dr, dc))) + 3],
                "quantization": [naive_index(lengths.index(dr * dr + dc * dc)) + 3],
                "cross": [naive_index(dr) + 3, naive_index(dc) + 10],
                "product": [(naive_index(dr) + 3) * 7 + naive_index(dc) + 3],
            }[method]
            for h in range(2):
                rows = [position.table[h, n] for n in terms]
                if mode == "contextual":
                    rows = [q[0, i, h] @ r * 6**-0.5 for r in rows]
                torch.testing.assert_close(got[0, h, i, j], torch.stack(rows).sum())


def test_irpe_has_a_row_for_every_bucket() -> None:
    """Seven to either side and none with beta = 3; by rows and columns, or in pairs."""
    for method, n in (("euclidean", 7), ("quantization", 7), ("cross", 14), ("product", 49)):
        build_ = POSITIONS.get("irpe")(method=method, mode="bias").build
        assert build_(6, heads=2).table.shape == (2, n)


def test_irpe_sees_offsets_only() -> None:
    layer = build(position="irpe")
    (x,) = documents(12)
    ys = []
    for f in (grid(3, 4), grid(3, 4, 20, 7)):
        layout = Layout.from_rows([[Doc(12, position=f.position[0].numpy())]])
        ys.append(layer(x[None], Ctx(layout, Full())).y)
    torch.testing.assert_close(*ys, **TOL)
    turned = Layout.from_rows([[Doc(12, position=grid(4, 3).position[0].numpy())]])
    assert (layer(x[None], Ctx(turned, Full())).y - ys[0]).abs().max() > 1e-4
    index = piecewise(torch.arange(-40, 41), 1.9, 3, 15)
    assert index.tolist() == [naive_index(i) for i in range(-40, 41)]


@pytest.mark.parametrize("method", ["cross", "product"])
def test_irpe_on_queries_keys_and_values_is_its_sum_pair_by_pair(method: str) -> None:
    layer = MIXERS.get("irpe_attention")(
        heads=2, position={"kind": "irpe", "method": method}
    ).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    layer.double()
    (x,), f = documents(12), grid(3, 4)
    K = layer.head_dim
    q, k, v = (x @ layer.qkv.weight.T).view(12, 3, 2, K).unbind(1)
    index = [b[0] for b in layer.position.buckets(f, f)]
    outs = []
    for i in range(12):
        for h in range(2):
            logits, values = [], []
            for j in range(12):
                on = {n: sum(t[h, b[i, j]] for b in index) for n, t in layer.tables.items()}
                score = q[i, h] @ k[j, h] + q[i, h] @ on["k"] + k[j, h] @ on["q"]
                logits.append(score * K**-0.5)
                values.append(v[j, h] + on["v"])
            outs.append(torch.stack(logits).softmax(0) @ torch.stack(values))
    expected = torch.cat(outs).view(12, -1) @ layer.out.weight.T
    layout = Layout.from_rows([[Doc(12, position=f.position[0].numpy())]])
    torch.testing.assert_close(layer(x[None], Ctx(layout, Full())).y[0], expected, **TOL)


def test_irpe_vectors_may_be_left_out() -> None:
    torch.manual_seed(0)
    make = MIXERS.get("irpe_attention")
    layer, (x,) = make(heads=2, on=["v"]).build(D).double(), documents(7)
    init_weights(layer)
    plain = build(position="none")
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "tables" not in k})
    torch.testing.assert_close(alone(layer, x), alone(plain, x), **TOL)  # zero at first
    assert [*layer.tables] == ["v"]


# ---- parallel context ----


def test_one_piece_is_plain_attention_and_the_order_of_pieces_does_not_matter() -> None:
    layer, (x,) = build(position="rope"), documents(14)
    run = lambda x, *sizes: apply(
        layer, x[None], Layout.from_rows([[parallel_blocks(*sizes)]]), mask=ParallelBlocks()
    ).y[0]
    torch.testing.assert_close(run(x, 2, [8], 4), alone(layer, x), **TOL)
    sink, a, b, question = x.split((2, 5, 3, 4))
    y = run(x, 2, [5, 3], 4)
    turned = run(torch.cat((sink, b, a, question)), 2, [3, 5], 4)
    torch.testing.assert_close(y[10:], turned[10:], **TOL)
    torch.testing.assert_close(y[2:7], turned[5:10], **TOL)
    torch.testing.assert_close(y[7:10], alone(layer, torch.cat((sink, b)))[2:], **TOL)
    # The question reads every piece and the sink; a piece reads no other.
    moved = torch.autograd.functional.jacobian(lambda x: run(x, 2, [5, 3], 4), x).abs().sum((1, 3))
    assert (moved[10:, :10] > 0).all() and (moved[7:10, 2:7] == 0).all()
    assert (moved[7:10, :2] > 0).all()


def test_parallel_context_decodes_from_a_cache() -> None:
    layer, (x,) = build(position="rope"), documents(14)
    doc = parallel_blocks(2, [5, 3], 4, slot=0)
    whole = apply(layer, x[None], Layout.from_rows([[doc]]), mask=ParallelBlocks()).y[0]
    with torch.no_grad():
        state, outs = layer.initial_state(1, 14), []
        for at, stop in ((0, 2), (2, 7), (7, 10), (10, 12), (12, 13), (13, 14)):
            part = Doc(
                stop - at,
                doc.position[at:stop],
                extra={k: v[at:stop] for k, v in doc.extra.items()},
                slot=0,
                fresh=at == 0,
            )
            out = apply(
                layer, x[None, at:stop], Layout.from_rows([[part]]), state, mask=ParallelBlocks()
            )
            state = out.state
            outs.append(out.y[0])
    torch.testing.assert_close(torch.cat(outs), whole, **TOL)


# ---- unpadded rows ----


def test_packed_rows_do_the_work_of_their_tokens_and_not_of_the_longest() -> None:
    """Linear parts see real tokens only.

    Attention pairs are those of each document, rounded up to the longest of its group.
    """
    lengths = (30, 3, 17, 9, 5)
    docs = documents(*lengths)
    attention = build()
    torch.manual_seed(0)
    ffn = FFNS.get("swiglu")(hidden=8).build(D)
    init_weights(ffn)
    ffn.double()
    assert isinstance(ffn, SwiGLU)
    packed = Layout.from_rows([[Doc(n) for n in lengths]])
    padded = Layout.from_rows([[Doc(n)] for n in lengths])
    x = torch.cat(docs)[None]
    wide = torch.nn.utils.rnn.pad_sequence(docs, batch_first=True, padding_value=1e9)
    for layer in (attention, ffn):
        y, rows = apply(layer, x, packed).y[0], apply(layer, wide, padded).y
        for one, row in zip(y.split(lengths), rows, strict=True):
            torch.testing.assert_close(one, row[: len(one)], **TOL)
    assert x.shape[1] == sum(lengths) and wide.shape[:2].numel() / x.shape[1] > 2.3
    pairs = sum(g.rows * g.length**2 for g in LengthBuckets.of(packed, Causal()).groups)
    assert pairs < 0.5 * len(lengths) * max(lengths) ** 2


def test_the_unpadded_layout_is_a_block_diagonal_mask() -> None:
    (x,), f = documents(14), Layout.from_rows([[Doc(5), Doc(1), Doc(8)]]).fields
    layer = build(position="none")
    blocks = torch.block_diag(*[torch.ones(n, n).tril() for n in (5, 1, 8)]).bool()
    assert torch.equal(Causal().dense(f, f)[0], blocks)
    q, k, v = (x @ layer.qkv.weight.T).view(14, 3, 2, 8).permute(1, 2, 0, 3)
    p: Tensor = (q @ k.mT * 8**-0.5).masked_fill(~blocks, -math.inf).softmax(-1)
    expected = (p @ v).transpose(0, 1).flatten(1) @ layer.out.weight.T
    got = apply(layer, x[None], Layout.from_rows([[Doc(5), Doc(1), Doc(8)]])).y[0]
    torch.testing.assert_close(got, expected, **TOL)
