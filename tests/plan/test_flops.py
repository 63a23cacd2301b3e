"""Operations of a traced step: every operator has a formula, and the formulas count right."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mm.kernels
from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec
from mm.layout import Doc, Layout
from mm.mask import Causal, Window
from mm.model.length_buckets import LengthBuckets
from mm.plan import flops
from mm.plan.fake_cuda import CUDA, fake_cuda
from mm.plan.inputs import documents
from mm.plan.trace import fake_mode, trace_step
from mm.registry import BACKBONES, NETWORKS


def _operators() -> list[str]:
    for found in pkgutil.walk_packages(mm.kernels.__path__, "mm.kernels."):
        if "triton" not in found.name:
            importlib.import_module(found.name)
    names = torch._C._dispatch_get_all_op_names()
    ours = {n.removeprefix("mm::").partition(".")[0] for n in names if n[:4] == "mm::"}
    # torch never forgets an operator: those that a test of declarations made are called toy_*
    return sorted(name for name in ours if not name.startswith("toy_"))


def test_every_operator_of_ours_has_a_formula() -> None:
    """A new kernel without one would be free in every plan: add it to `mm.plan.flops.FORWARD`."""
    names = _operators()
    assert len(names) > 40
    without = [n for n in names if flops.formula_of(n) is None]
    assert not without, f"no formula in mm/plan/flops.py: {without}"


def test_products_by_group_count_every_row_once() -> None:
    """Rows by the matrices of their groups, and the gradient of these: two a multiply-add."""
    op, offs = torch.ops.aten._grouped_mm.default, torch.tensor([16, 32], dtype=torch.int32)
    x, weight, dy = torch.ones(32, 8), torch.ones(2, 8, 24), torch.ones(32, 24)
    for a, b in ((x, weight), (dy, weight.transpose(1, 2)), (x.T, dy)):
        assert flops.flops_of(op, (a, b, offs), {}, op(a, b, offs)) == 2 * 32 * 8 * 24


@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (3, 8), (8, 8)])
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 1), (True, 4)])
def test_pairs_are_those_of_the_mask(T: int, S: int, causal: bool, window: int | None) -> None:
    mask = MaskSpec(causal=causal, window=window).dense(T, S, torch.device("cpu"))
    counted = T * S if mask is None else int(mask.sum())
    assert flops.pairs(T, S, causal, window) == counted


def _trace(pattern: str, tokens: int, document: int, heads: int = 2, **backbone: object) -> object:
    config = NETWORKS.parse("lm").model_copy(
        update={
            "d_model": 64,
            "backbone": BACKBONES.parse(
                {"kind": "stack", "depth": 2, "pattern": pattern} | backbone
            ),
        }
    )
    with fake_mode() as fake:
        model = config.build().train()
    batch = documents(1, tokens, document, None)
    losses = lambda: iter([model(batch, seed=1).heads["tokens"].nll.sum()])
    return trace_step(fake, {"model": model}, losses, tokens), model


def test_a_dense_layer_counts_six_operations_a_weight() -> None:
    """Kaplan et al. 2020: two forward and four backward, for every weight of a matrix."""
    trace, model = _trace("attention", 64, 1)  # documents of one token: no attention to speak of
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embedder" not in n
    )
    total = sum(trace.flops("forward", "backward").values()) / 64
    assert total == pytest.approx(6 * matrices, rel=0.05)


def test_packed_documents_cost_what_they_cost_apart() -> None:
    """Attention of documents grows with their own lengths, not with the row's."""
    long, _ = _trace("attention", 2048, 2048)
    short, _ = _trace("attention", 2048, 128)
    d, depth = 64, 2
    more = long.flops("forward")["attention"] - short.flops("forward")["attention"]
    expected = 2 * 2 * d * depth * (2048 * 2049 / 2 - 16 * 128 * 129 / 2)
    assert more == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_made_again_is_no_operation_of_the_model(mode: str) -> None:
    plain, _ = _trace("rg_lru attention", 64, 64)
    again, _ = _trace("rg_lru attention", 64, 64, recompute=mode)
    count = lambda t: sum(t.flops("forward", "backward").values())
    assert count(again) == pytest.approx(count(plain), rel=0.01)
    assert sum(again.flops("recompute").values()) > 0
    assert not plain.flops("recompute")
    assert again.forward_peak < plain.forward_peak


MIXERS_OF_ALL_FAMILIES = (
    "attention", "latent_attention", "gla", "rwkv6", "gated_deltanet", "mlstm", "mamba", "s4d",
    "s5", "rg_lru", "min_gru", "lstm", "short_conv", "hyena", "ttt",
)  # fmt: skip


@pytest.mark.parametrize("name", MIXERS_OF_ALL_FAMILIES)
def test_any_mixer_is_traced(name: str) -> None:
    """No table a mixer: the same code runs as in training."""
    trace, _ = _trace(name, 32, 16)
    assert not trace.unknown
    forward, backward = trace.flops("forward"), trace.flops("backward")
    mixers = set(forward) - {"blocks", "head", "embedder", "swiglu", "other"}
    assert mixers and all(forward[m] > 0 and backward[m] > 0 for m in mixers)
    assert all(trace.saved[m] > 0 for m in mixers)


@pytest.mark.parametrize("window", [None, 8])
def test_packed_rows_count_alike_whichever_kernel_takes_them(window: int | None) -> None:
    """Forward and backward; where documents begin is a value, which a plan does not know."""
    counted = {}
    for name, kind in (("varlen", torch.bfloat16), ("triton", torch.float32)):
        with fake_cuda():
            layout = Layout.from_rows([[Doc(300), Doc(212)], [Doc(512)]], 512).to(CUDA)
            mask = Causal() if window is None else Window(window)
            (group,) = LengthBuckets.of(layout, mask, flat=True).groups
            q, k, v = (torch.empty(2, 512, n, 64, dtype=kind, device=CUDA) for n in (4, 2, 2))
            given = [x.requires_grad_() for x in (q, k, v)]
            assert attention.pick(*given, group.mask) == name
            total: list[float] = []
            with _Counted(total):
                y = attention(*given, group.mask)
                torch.autograd.grad(y.float().sum(), given)
            counted[name] = sum(total)
    assert counted["varlen"] == pytest.approx(counted["triton"], rel=1e-6)
    seen = flops.pairs(512, 512, True, window)
    assert counted["varlen"] == pytest.approx((1 + flops.TILES) * 4 * 2 * 4 * 64 * seen, rel=1e-6)


class _Counted(TorchDispatchMode):
    """Operations of attention alone."""

    def __init__(self, into: list[float]) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "attn" in func.name() or "attention" in func.name():
            self.into.append(flops.flops_of(func, args, kwargs or {}, made) or 0.0)
        return made
