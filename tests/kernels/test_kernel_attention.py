"""Attention by tiles (plain torch, and Triton) against the reference, memory, statistics."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from kernel_checks import randn
from thinned import every
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm.kernels import compiler
from mm.kernels.attention import attention, blocks, flash_cpp
from mm.kernels.attention.spec import MaskSpec, ScoreSpec

SIZES = [(1, 1, 1, 1, 1), (2, 3, 3, 4, 2), (1, 65, 65, 2, 1), (2, 40, 60, 4, 2), (1, 9, 5, 2, 2)]
STATS = ("key_mass", "entropy")


def last(x: Tensor, T: int) -> Tensor:
    """What is known of the queries: they are the last keys."""
    return x[:, -T:] if T <= x.shape[1] else torch.cat((x, x, x), 1)[:, :T]


def masks(R: int, T: int, S: int) -> dict[str, MaskSpec]:
    torch.manual_seed(T)
    document = torch.randint(0, 3, (R, S)).sort(1)[0]
    prefix = torch.randint(0, 3, (R, S)).sort(1)[0]
    allowed = torch.rand(R, T, S) < 0.6
    allowed[:, 0] = False
    documents = MaskSpec(document_RT=last(document, T), document_RS=document)
    prefixes = MaskSpec(causal=True, prefix_RT=last(prefix, T), prefix_RS=prefix)
    return {
        "none": MaskSpec(),
        "causal": MaskSpec(causal=True),
        "window": MaskSpec(causal=True, window=4),
        "a window that sees what comes": MaskSpec(window=3),
        "allowed": MaskSpec(allowed, causal=True),
        "documents": documents,
        "documents and window": documents._replace(causal=True, window=7),
        "prefix": prefixes,
        "prefix and documents": MaskSpec(None, True, 9, *documents[3:5], *prefixes[5:]),
    }


def scores(R: int, T: int, S: int, H: int) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Tensors with gradients, and the rest."""
    fade = -randn(R, S, H, seed=3).detach().abs().cumsum(1)
    fades = {"fade_RTH": last(fade, T), "fade_RSH": fade}
    place = torch.arange(S)[None].expand(R, S)
    places = {"position_RT": last(place, T), "position_RS": place}
    table, sink = randn(9, H, seed=5).detach(), randn(H, seed=6).detach()
    return {
        "plain": ({}, {}),
        "fade": (fades, {}),
        "sinks and soft-cap": ({"sink_H": sink}, {"softcap": 1.5}),
        "bias": ({"bias_RHTS": randn(1, H, T, S, seed=7).detach()}, {}),
        "all": (
            {
                **fades,
                "relative_NH": table,
                "sink_H": sink,
                "bias_RHTS": randn(R, 1, 1, S, seed=7).detach(),
            },
            {**places, "softcap": 2.0, "scale": 0.3},
        ),
        "relative": ({"relative_NH": table}, places),
    }


def results(
    name: str,
    qkv: list[Tensor],
    mask: MaskSpec,
    score: tuple[dict[str, Tensor], dict[str, Any]],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Output, statistics and all gradients."""
    args = [t.detach().to(dtype).requires_grad_() for t in qkv]
    # Vectors beside the keys stay wide, as mixers give them.
    wide = torch.promote_types(dtype, torch.float32)
    leaves, rest = score
    named = {n: t.detach().to(wide).requires_grad_() for n, t in leaves.items()}
    with attention.using(name):
        y, *stats = attention(*args, mask, ScoreSpec(**named, **rest), return_stats=STATS)
    weight = randn(*y.shape, seed=99).detach()
    grads = torch.autograd.grad((y.double() * weight).sum(), [*args, *named.values()])
    return [t.double() for t in (y, *stats, *grads)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mask", masks(1, 1, 1))
def test_tiles_equal_the_reference(
    sizes: tuple[int, ...], mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    R, T, S, H, G = sizes
    monkeypatch.setattr(blocks, "QUERIES", 16)
    monkeypatch.setattr(blocks, "KEYS", 24)
    monkeypatch.setattr(blocks, "IN_HAND", 16 * 24 * 2)
    qkv = [
        randn(R, n, h, w, seed=i) for i, (n, h, w) in enumerate(((T, H, 6), (S, G, 6), (S, G, 9)))
    ]
    for kind, score in scores(R, T, S, H).items():
        hides = masks(R, T, S)[mask]
        expected = results("reference", qkv, hides, score, torch.float64)
        kinds = [(torch.float64, 1e-10)] + [(torch.float32, 5e-5)] * (kind == "all")
        for dtype, tolerance in kinds:
            got = results("blocks", qkv, hides, score, dtype)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=kind)


@pytest.mark.parametrize("mask", ["documents", "prefix and documents", "allowed"])
def test_tiles_without_a_question_are_the_same(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is not asked which tiles are hidden: all bits but of sums over distances."""
    R, T, S, H, G = 2, 40, 60, 4, 2
    monkeypatch.setattr(blocks, "QUERIES", 16)
    monkeypatch.setattr(blocks, "KEYS", 24)
    qkv = [randn(R, n, h, 6, seed=i) for i, (n, h) in enumerate(((T, H), (S, G), (S, G)))]
    hides, score = masks(R, T, S)[mask], scores(R, T, S, H)["all"]
    asked = results("blocks", qkv, hides, score, torch.float32)
    monkeypatch.setattr(blocks, "ASKED", ())
    monkeypatch.setattr(torch, "aminmax", None)
    *others, table, sink, bias = results("blocks", qkv, hides, score, torch.float32)
    *right, right_table, right_sink, right_bias = asked
    for a, b in zip((*others, sink, bias), (*right, right_sink, right_bias), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(table, right_table, rtol=1e-5, atol=1e-5)


TALL = [(2, 130, 130, 4, 2), (1, 64, 200, 2, 2), (1, 70, 33, 2, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", SIZES + TALL, ids=str)
@pytest.mark.parametrize("mask", [name for name in masks(1, 1, 1) if name != "allowed"])
def test_cpp_equals_the_reference(
    sizes: tuple[int, ...], mask: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := compiler.why_not(flash_cpp.SOURCE):
        pytest.skip(reason)
    monkeypatch.setattr(sys.modules[attention.__module__], "FEW", 0)
    R, T, S, H, G = sizes
    for width in (6, 64):
        widths = ((T, H, width), (S, G, width), (S, G, width + 3))
        qkv = [randn(R, n, h, w, seed=i).to(dtype) for i, (n, h, w) in enumerate(widths)]
        for kind in ("plain", "fade", "sinks and soft-cap"):
            hides, score = masks(R, T, S)[mask], scores(R, T, S, H)[kind]
            expected = results("reference", qkv, hides, score, torch.float64)
            got = results("cpp", qkv, hides, score, dtype)
            rms = lambda x: x.square().mean().sqrt()
            floor = 0.1 * max(map(rms, expected))  # a gradient that is zero holds rounding alone
            for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                error = rms(a - b) / (rms(b) + floor)
                assert error < {torch.float32: 5e-6, torch.bfloat16: 4e-2}[dtype], (kind, i, error)


def test_cpp_threads_slices_and_what_is_not_a_number() -> None:
    """Slices of one projection are read in place; many threads give the bits of one.

    NaN and what a query must not see stay where they are.
    """
    if reason := compiler.why_not(flash_cpp.SOURCE):
        pytest.skip(reason)
    qkv = torch.randn(2, 300, 6 + 2 + 2, 32, generator=torch.Generator().manual_seed(0))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with attention.using("cpp"):
            y = attention(*x.split((6, 2, 2), dim=2), MaskSpec(causal=True))
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y, grad = run(qkv)
        torch.set_num_threads(4)
        assert all(torch.equal(a, b) for a, b in zip(run(qkv), (y, grad), strict=True))
    finally:
        torch.set_num_threads(before)
    broken = qkv.clone()
    broken[0, 200, 7] = math.nan  # one of the keys
    z = run(broken)[0]
    assert torch.equal(z[1], y[1]) and torch.equal(z[0, :200], y[0, :200])
    assert z[0, 200:, 3:].isnan().all() and torch.equal(z[0, :, :3], y[0, :, :3])


def test_cpp_compiles_to_one_graph_with_its_gradient() -> None:
    """The example of the `one graph` law has a mask that this kernel does not take."""
    if reason := compiler.why_not(flash_cpp.SOURCE):
        pytest.skip(reason)
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, 130, n, 8, generator=g).requires_grad_() for n in (4, 2, 2)]
    f = lambda q, k, v: attention(q, k, v, MaskSpec(causal=True, window=40))
    with attention.using("cpp"):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        got, expected = compiled(*qkv), f(*qkv)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), qkv),
        torch.autograd.grad(expected.square().sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_query_far_below_its_first_keys_keeps_its_own() -> None:
    """Keys hidden from a query in one tile do not drown far smaller logits in the next."""
    q = torch.full((1, 1, 1, 1), 1.0)
    k = torch.cat((torch.zeros(1, blocks.KEYS, 1, 1), torch.full((1, 2, 1, 1), -500.0)), 1)
    v = torch.arange(float(blocks.KEYS + 2)).view(1, -1, 1, 1)
    allowed = torch.zeros(1, 1, blocks.KEYS + 2, dtype=torch.bool)
    allowed[..., -1] = True
    with attention.using("blocks"):
        assert attention(q, k, v, MaskSpec(allowed)).item() == blocks.KEYS + 1


def test_statistics_are_sums_of_the_weights() -> None:
    q, k, v = randn(1, 3, 2, 4), randn(1, 3, 1, 4, seed=1), randn(1, 3, 1, 5, seed=2)
    logits = torch.einsum("rthk,rsk->rhts", q, k[:, :, 0]) / 2
    p = logits.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    causal = MaskSpec(causal=True)
    y, mass = attention(q, k, v, causal, return_stats=("key_mass",))
    torch.testing.assert_close(mass, p.sum(2))
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 3.0).double())
    _, entropy = attention(q, k, v, causal, return_stats=("entropy",))
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1))
    assert not mass.requires_grad and not entropy.requires_grad
    torch.testing.assert_close(y, attention(q, k, v, causal))


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_memory_grows_with_the_length_not_its_square() -> None:
    largest = {}
    for T in (1024, 2048):
        q = torch.randn(1, T, 2, 4)
        f = torch.randn(1, T, 2).abs().cumsum(1).neg()
        place = torch.arange(T)[None]
        score = ScoreSpec(
            fade_RTH=f,
            fade_RSH=f,
            relative_NH=torch.randn(33, 2),
            position_RT=place,
            position_RS=place,
            scale=0.5,
            softcap=3.0,
            sink_H=torch.zeros(2),
        )
        specs = (MaskSpec(causal=True), score)
        with _Largest() as seen:
            y, lse = blocks.forward(q, q, q, *specs)
            blocks.backward(q, q, q, *specs, y, lse, y, ["fade_RTH", "relative_NH", "sink_H"])
        largest[T] = seen.elements
    assert largest[1024] == largest[2048] <= max(blocks.IN_HAND, blocks.QUERIES * blocks.KEYS)


def test_what_runs_where() -> None:
    """On a CPU: few queries and what has no compiler stay with SDPA, the rest are done in tiles."""
    q, small = torch.empty(1, 512, 2, 8), torch.empty(1, 16, 2, 8)
    wide = q.double()
    tiles = "blocks" if compiler.why_not(flash_cpp.SOURCE) else "cpp"
    pick = lambda x, *specs: attention.pick(x, x, x, *specs)
    causal, near = MaskSpec(causal=True), MaskSpec(causal=True, window=4)
    assert pick(wide, causal) == pick(wide) == "sdpa"
    assert pick(q, causal) == ("cpp" if tiles == "cpp" else "sdpa")
    assert pick(small, causal) == pick(small, near) == "sdpa"
    for mask, score in (
        (near, ScoreSpec()),
        (causal, ScoreSpec(softcap=4.0)),
        (causal, ScoreSpec(sink_H=torch.zeros(2))),
    ):
        assert pick(wide, mask, score) == "blocks" and pick(q, mask, score) == tiles
    assert pick(q, MaskSpec(torch.ones(1, 512, 512, dtype=torch.bool))) == "blocks"
    with pytest.raises(TypeError, match="windows"):
        attention(q, q, q, windows=4)
    assert pick(q, MaskSpec(), ScoreSpec(gain_RHTS=torch.ones(1, 1, 1, 512))) == "reference"


# ---- Triton ----

TRITON = ["causal", "window", "documents", "documents and window", "prefix"]
TRITON += ["none", "prefix and documents"]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize("sizes", [(2, 3, 3, 4, 2), (2, 35, 35, 4, 2), (1, 9, 40, 2, 1)], ids=str)
@pytest.mark.parametrize(
    "mask,kind",
    every(2, map(pytest.param, TRITON, ["plain", "sinks and soft-cap", "fade"] * 3)),
)
def test_triton(
    mask: str,
    kind: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from triton_oracle import interpreted

    from mm.kernels.attention import flash_triton

    monkeypatch.setattr(flash_triton, "tile", lambda *a: (16, 16, 4, 1))
    monkeypatch.setattr(flash_triton, "STEP", 16)
    R, T, S, H, G = sizes
    widths = ((T, H, 12), (S, G, 12), (S, G, 20))
    qkv = [randn(R, n, h, w, seed=i).to(dtype) for i, (n, h, w) in enumerate(widths)]
    hides, score = masks(R, T, S)[mask], scores(R, T, S, H)[kind]
    expected = results("reference", qkv, hides, score, torch.float64)
    with interpreted():
        got = results("triton", qkv, hides, score, dtype)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = (a - b).square().mean().sqrt() / (b.square().mean().sqrt() + 1e-2)
        assert error < {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype], (i, error)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_triton_visits_tiles_of_its_own_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hidden tile that is visited makes NaN of what it hides; the work is the sum of squares."""
    pytest.importorskip("triton")
    from triton_oracle import interpreted

    from mm.kernels.attention import flash_triton

    monkeypatch.setattr(flash_triton, "tile", lambda *a: (16, 16, 4, 1))
    monkeypatch.setattr(flash_triton, "STEP", 16)
    number = torch.tensor([3] * 32 + [1] * 32 + [7] * 48 + [0] * 16)[None]  # in no order
    own = (number[0] == 3) | (number[0] == 7)
    mask = MaskSpec(causal=True, document_RT=number, document_RS=number)
    q, k, v = (randn(1, 128, 2, 8, seed=i).detach().float() for i in range(3))

    def run(*qkv: Tensor) -> list[Tensor]:
        args = [x.clone().requires_grad_() for x in qkv]
        with interpreted(), attention.using("triton"):
            y = attention(*args, mask)
            weight = torch.where(own[:, None, None], y.detach(), 0.0)
            return [x[:, own] for x in (y, *torch.autograd.grad(y, args, weight))]

    other = ~own[:, None, None]
    for a, b in zip(
        run(*(x.masked_fill(other, math.nan) for x in (q, k, v))), run(q, k, v), strict=True
    ):
        assert a.isfinite().all() and torch.equal(a, b)
    call = flash_triton._Call(q, k, v, mask, ScoreSpec())
    for by_keys in (False, True):
        with interpreted():
            ranges = call.find_ranges(by_keys, 16, 8)
        assert ranges is not None
        low, high = ranges[0].unbind(-1)
        visited = ((high - low // 16 * 16).clamp_min(0) / 16).ceil().sum()
        assert visited == 3 + 3 + 6  # halves of the squares of 2, 2 and 3 tiles; causal: of 8, 36


def test_triton_refuses_what_no_tile_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.kernels import device

    monkeypatch.setattr(device, "KIND", "cpu")
    why_not = attention.implementations["triton"][1]
    heads = lambda width, dtype: torch.empty(1, 4, 2, width, dtype=dtype)
    for width, dtype, reason in (
        (256, torch.bfloat16, None),
        (128, torch.float32, None),
        (160, torch.float32, "float32 heads wider than 128"),
        (260, torch.bfloat16, "heads wider than 256"),
    ):
        q = heads(width, dtype)
        found = why_not(q, q, q, MaskSpec(causal=True, window=2), ScoreSpec(), ())
        assert found is None if reason is None else reason in (found or ""), (width, dtype, found)
