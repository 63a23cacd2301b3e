"""`nested` against plain slices, alone and cut to an ordinary model. B rows, T tokens, F hidden."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from generation_toys import VOCABULARY, V
from torch import Tensor

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.linears.lora import Lora
from mm.model.noise import STEP_SEED
from mm.registry import FFNS, LINEARS, NETWORKS, SURGERIES
from mm.surgery.base import Operated, network_of, own_tensors

D, HIDDEN = 8, 32
WIDTHS = (4, 8, 16, 32)


def build(linear: Any = "dense", **values: Any) -> Any:
    torch.manual_seed(0)
    given = {"kind": "nested", "hidden": HIDDEN, **values}
    layer = cast(Any, FFNS.parse(given)).build(D, cast(Any, LINEARS.parse(linear)).build)
    init_weights(layer)
    return layer.double()


def context(step: float | None = None, seed: int = 0, T: int = 5) -> Ctx:
    scheduled = {} if step is None else {STEP_SEED: step}
    return Ctx(Layout.plain(2, T), Causal(), scheduled=scheduled, seed=seed)


def step_of(layer: Any, width: int) -> float:
    """A step that draws this width."""
    return next(s for s in range(99) if layer.units(context(s)) == width)


def plain(x: Tensor, n: int, matrices: list[Tensor], biases: list[Tensor], gated: bool) -> Tensor:
    """The feed-forward of the first ``n`` hidden units."""
    first, out = matrices
    at = [*range(n), *range(HIDDEN, HIDDEN + n)] if gated else [*range(n)]
    made = x @ first[at].T + (biases[0][at] if biases else 0)
    hidden = F.gelu(made[..., :n]) * made[..., n:] if gated else F.gelu(made)
    return hidden @ out[:, :n].T + (biases[1] if biases else 0)


@pytest.mark.parametrize("linear", [{"kind": "dense", "bias": True}, "lora"], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_each_width_is_its_slice_with_all_gradients(gated: bool, linear: Any) -> None:
    """What is behind the width has a gradient of zeros, not none."""
    layer = build(linear, gated=gated)
    first, out = layer.gate_up if gated else layer.up, layer.out
    leaves, biases = [], []
    if linear == "lora":
        for part in (first, out):
            assert isinstance(part, Lora)
            torch.nn.init.normal_(part.lora_b)
        matrices = [first.dense_weight(), out.dense_weight()]
    else:
        matrices, biases = [first.weight, out.weight], [first.bias, out.bias]
        for bias in biases:
            torch.nn.init.normal_(bias)
        leaves = [*layer.parameters()]
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    for n in WIDTHS:
        y = layer(x, context(step_of(layer, n))).y
        wanted = plain(x, n, matrices, biases, gated)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        got, expected = (torch.autograd.grad(t.square().sum(), [x, *leaves]) for t in (y, wanted))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_step_draws_one_width_for_all() -> None:
    """Layers, ranks and micro-batches (other seeds) alike; each width about as often."""
    one, two = build(), build(hidden=64)
    one.path, two.path = "backbone.layers.0.ffn", "backbone.layers.1.ffn"
    drawn = [one.units(context(step)) for step in range(400)]
    assert drawn == [two.units(context(step, seed=step + 7, T=3)) // 2 for step in range(400)]
    count = Counter(drawn)
    assert {*count} == {*WIDTHS} and min(count.values()) > 70
    assert one.units(context()) == HIDDEN, "nobody seeded the step"
    assert {one.eval().units(context(step)) for step in range(20)} == {HIDDEN}
    assert build(eval_hidden=12).eval().units(context(3)) == 12


@pytest.mark.slow
def test_a_compiled_block_takes_what_was_prefetched() -> None:
    """Its graph knows the width of the step, and is not made anew for each step."""
    layer = build(gated=True)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    graphs: list[Any] = []
    torch._dynamo.reset()
    keep = lambda graph, _: graphs.append(graph) or graph.forward
    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    for step in range(12):
        ctx = context(step)
        layer.prefetch(ctx, False)
        torch.testing.assert_close(compiled(x, ctx).y, layer(x, context(step)).y)
    drawn = {layer.units(context(step)) for step in range(12)}
    assert len(drawn) > 2 and len(graphs) == len(drawn)


def model(linear: Any = "dense", **ffn: Any) -> Operated:
    nested = {"kind": "nested", "hidden": 64, "activation": "silu", **ffn}
    stack = {"kind": "stack", "depth": 3, "pattern": "attention", "ffn": nested}
    values = {"kind": "lm", "d_model": 32, "backbone": stack, "linear": linear}
    config = NETWORKS.parse(values)
    made = config.build(VOCABULARY)
    init_weights(made, 1)
    for name, p in made.named_parameters():
        torch.nn.init.normal_(p, std=0.1) if name.endswith("bias") else None
    return Operated(config, own_tensors(made), VOCABULARY)


def hidden(net: Any) -> Tensor:
    layout = Layout.from_rows([[Doc(9), Doc(4)], [Doc(13)]])
    ids = torch.randint(V, layout.shape, generator=torch.Generator().manual_seed(0))
    return net(Batch.of_ids(ids, layout), heads=()).hidden


@pytest.mark.parametrize(
    "gated,kind,bias,widths",
    [
        (False, "mlp", True, (8, 8, 8)),
        (True, "swiglu", True, (64, 8, 24)),
        (True, "swiglu", False, (16, 16, 8)),
    ],
)
def test_a_sliced_model_is_the_narrow_one_bit_by_bit(
    gated: bool, kind: str, bias: bool, widths: tuple[int, ...]
) -> None:
    before = model({"kind": "dense", "bias": bias}, gated=gated)
    surgery = SURGERIES.parse({"kind": "slice_nested", "hidden": widths})
    after = cast(Any, surgery).apply(before, VOCABULARY)
    whole, cut = network_of(before), network_of(after)
    for layer, n in zip(cast(Any, whole).backbone.layers, widths, strict=True):
        layer.ffn.eval_hidden = n
    assert torch.equal(hidden(cut), hidden(whole))
    layers = cast(Any, cut).backbone.layers
    assert [(layer.ffn.kind, layer.ffn.out.weight.shape[1]) for layer in layers] == [
        (kind, n) for n in widths
    ]
    assert len({*after.config.backbone.words()}) == len({*widths})


def test_widths_of_evaluation_are_the_default_and_adapters_are_merged_before() -> None:
    after = cast(Any, SURGERIES.parse("slice_nested")).apply(model(eval_hidden=24), VOCABULARY)
    assert (
        after.config.backbone.ffn.hidden == 24
        and after.config.backbone.words() == ["attention"] * 3
    )
    with pytest.raises(UserError, match="merge_lora before"):
        cast(Any, SURGERIES.parse("slice_nested")).apply(model("lora"), VOCABULARY)
    merged = cast(Any, SURGERIES.parse("merge_lora")).apply(model("lora"), VOCABULARY)
    assert cast(Any, SURGERIES.parse("slice_nested")).apply(merged, VOCABULARY)


@pytest.mark.parametrize(
    "values,why",
    [({"hidden": 36}, "no multiple of 8"), ({"eval_hidden": 33}, "more than hidden 32")],
)
def test_widths_that_cannot_be_are_refused(values: dict[str, int], why: str) -> None:
    with pytest.raises(UserError, match=why):
        build(**values)
