"""Law: on an accelerator in bf16 a linear recurrence multiplies bf16 and sums in float32.

What is multiplied enters its kernel in the dtype of the projections, rounded once; log decays,
strengths and states are float32. As in flash-linear-attention and mamba-ssm. On the CPU, whose
forms multiply float32, linear attention is given that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from laws import VARIANTS, D, context
from test_no_silent_host import PACKED, PREFILL, STEP, N
from thinned import every
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm.kernels import device
from mm.kernels.linear_attention import linear_attention
from mm.kernels.op import Op
from mm.layout import Layout
from mm.model.backbones.stack import StackConfig
from mm.model.layer import Layer, init_weights
from mm.plan.fake_cuda import CUDA, fake_cuda

# Arguments that matrix instructions multiply, and the inputs of a scan; all others are float32.
MULTIPLIED = {
    "linear_attention": {"q", "k", "v"},
    "delta_rule": {"q", "k", "v"},
    "selective_scan": {"u", "b", "c"},
}
# Its output is the difference of two sums, each of which may be far larger.
WIDE = ("mixer:windowed_state",)
KINDS = (
    "capped_state delta_rule ecoformer linear_attention mamba mlstm prefix_linear_attention rwkv6 "
    "windowed_state"
)
PRESETS = (
    "based capped_mamba2 cross_scan_mamba deltanet forget_more_mamba2 gated_deltanet gla hgrn2 "
    "jamba_mamba jrt lightning_attention linear_attention madeon mamba2 recurformer retnet "
    "simple_gla"
)
LINEAR = [f"mixer:{x}" for x in KINDS.split()] + [f"preset:{x}" for x in PRESETS.split()]


class Calls(TorchDispatchMode):
    """Notes the ops of `MULTIPLIED` and the dtypes of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("mm::").removesuffix("_triton")
        if name in MULTIPLIED:
            given = zip(func._schema.arguments, args, strict=False)
            floats = [(a.name, x) for a, x in given if isinstance(x, Tensor)]
            kinds = {n: x.dtype for n, x in floats if x.is_floating_point()}
            self.seen.append((name, kinds))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def calls(name: str, parameters: torch.dtype) -> list[tuple[str, dict[str, torch.dtype]]]:
    """Of packed training, a prefill and a decoding step; float32 parameters are autocast."""

    def run(layer: Layer, layout: Layout, state: Any = None) -> Any:
        ids = torch.zeros(*layout.shape, 1, dtype=torch.int32, device=CUDA)
        x = torch.empty(*layout.shape, D, device=CUDA, dtype=parameters)
        ctx = context(layer, x, layout.to(CUDA), ids=ids)
        with torch.autocast("cuda", torch.bfloat16, enabled=parameters == torch.float32):
            layer.prefetch(ctx, state is not None)
            return layer(x, ctx, state).state

    with fake_cuda(), Calls() as found:
        with CUDA, default_dtype(parameters):
            layer = VARIANTS[name]()
        run(layer, PACKED)
        if layer.caps.step:
            with CUDA:
                state = layer.initial_state(N, 32)
            run(layer, STEP, run(layer, PREFILL, state))
    return found.seen


def hold_the_law(name: str, parameters: torch.dtype) -> int:
    """How many calls do."""
    found = calls(name, parameters)
    for op, kinds in found:
        narrow = MULTIPLIED[op] if name not in WIDE else ()
        expected = {n: torch.bfloat16 if n in narrow else torch.float32 for n in kinds}
        assert kinds == expected, op
    return len(found)


@pytest.mark.parametrize("name", every(3, [n for n in LINEAR if "capped" not in n]))
def test_kernels_are_given_bf16(name: str) -> None:
    assert hold_the_law(name, torch.float32) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith(("mixer:", "preset:"))])
def test_all_kernels_are_given_bf16(name: str) -> None:
    for parameters in (torch.float32, torch.bfloat16):
        found = hold_the_law(name, parameters)
        assert (found > 0) == (name in LINEAR), "LINEAR lists what calls a linear recurrence"


def error_of(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of outputs and of the gradient of the input under autocast, against float64; by reference.

    Args:
        kind: of device that Triton is for: "cpu" gives the ops what a GPU is given.
    """
    torch.manual_seed(0)
    layer = StackConfig(pattern=name).mixer(name).build(64)
    init_weights(layer)
    x = torch.randn(2, 96, 64).bfloat16().float()
    weights = torch.randn(2, 96, 64)
    found = []
    for dtype in (torch.float32, torch.float64):
        layer, leaf = layer.to(dtype), x.to(dtype).requires_grad_()
        monkeypatch.setattr(device, "KIND", kind if dtype == torch.float32 else "cuda")
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = layer(leaf, context(layer, leaf, Layout.plain(2, 96))).y
        found.append((y, *torch.autograd.grad((y * weights).sum(), leaf)))
    return [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n[7:] for n in LINEAR if n.startswith("preset:")])
def test_a_mixer_errs_no_more_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding q, k and v adds at most what rounding them in the projection did: sqrt 2 in all."""
    monkeypatch.setattr(Op, "everywhere", "reference")
    wide, narrow = (error_of(name, kind, monkeypatch) for kind in ("cuda", "cpu"))
    assert all(b < 1.5 * a for a, b in zip(wide, narrow, strict=True)), (wide, narrow)


FORMS = ("based", "gla", "hgrn2", "mamba2", "mlstm", "retnet", "rwkv6")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("way", ["chunked", "triton"])
def test_errors_are_those_of_rounded_inputs(name: str, way: str) -> None:
    """Against float64: of what a mixer makes of noise, with q, k and v rounded to bf16.

    No kernel can do better than the float64 recurrence of rounded q, k and v with rounded
    gradients; matrix instructions round scores and states besides.
    """
    given = call_of(name)
    weights = torch.randn(given[2].shape, generator=torch.Generator().manual_seed(1))
    narrow = [t.bfloat16() for t in given[:3]]
    decay = given[3:]
    exact = results("reference", given, weights)
    floor = results("reference", [*(t.double() for t in narrow), *decay], weights)
    floor[2:5] = [t.bfloat16() for t in floor[2:5]]
    if way == "triton":
        pytest.importorskip("triton")
        from triton_oracle import interpreted

        with interpreted():
            ours = results(way, [*narrow, *(t.float() for t in decay)], weights)
    else:
        ours = results(way, [*narrow, *(t.float() for t in decay)], weights)
    labels = ("o", "state", "dq", "dk", "dv", "dg")
    for label, x, least, y in zip(labels, ours, floor, exact, strict=False):
        allowed = 1.05 if way == "chunked" else 4.0 if label == "dg" else 2.0
        error = lambda a, y=y: float((a.double() - y).norm() / y.norm())
        assert error(x) <= allowed * error(least), f"{label}: {error(x):.1e}, {error(least):.1e}"


def call_of(name: str) -> list[Tensor]:
    """q, k, v and perhaps log decays, float64, of a mixer that is given noise."""
    torch.manual_seed(0)
    layer = StackConfig(pattern=name).mixer(name).build(128)
    init_weights(layer)
    layer.double()
    seen: list[tuple[Any, ...]] = []
    x = torch.randn(1, 160, 128, dtype=torch.float64)
    Op.observer = lambda op, args, kw, out: seen.append(args) if op is linear_attention else None
    try:
        with torch.no_grad():
            layer(x, context(layer, x, Layout.plain(1, 160)))
    finally:
        Op.observer = None
    return [t for t in seen[-1] if t is not None]


def results(way: str, given: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Outputs, the last state and the gradients of a weighted sum of outputs."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    with linear_attention.using(way):
        o, last = linear_attention(*leaves)
    return [o.detach(), last.detach(), *torch.autograd.grad((o * weights).sum(), leaves)]
