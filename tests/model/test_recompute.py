"""What trades memory or start-up time for speed changes no loss and no gradient."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from laws import build, context, documents, layers, packed
from pydantic import ValidationError
from thinned import only
from trainer_runs import losses, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.kernels.op import Op
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model import recompute
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.registry import BLOCKS, FFNS, MIXERS
from mm.run import Run
from mm.trainer.loop import train


@pytest.fixture(autouse=True)
def _no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@layers
def test_selective_recomputation_is_bit_exact(name: str) -> None:
    """A layer that writes over results that would be kept says so (`Layer.overwrites`)."""
    layer, docs = build(name), documents(4, 5)
    x, layout = packed([[(0, docs[0], 0), (1, docs[1], 0)]], pad=1)
    weight, ctx = torch.randn_like(x), context(layer, x, layout, seed=3)
    mode, found = recompute.resolve_mode("selective", layer), []
    for call in (layer, partial(recompute.run, mode, layer)):
        inputs = x.clone().requires_grad_()
        out = call(inputs, ctx, None)
        loss = (out.y * weight).sum() + sum(s.total.sum() for s in out.aux.values())
        wanted = [inputs, *layer.parameters()]
        found.append((loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_the_check_of_a_kernel_is_not_counted_as_work(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first call of a kernel runs more operators in the pass that keeps results.

    It runs more there than in the pass that makes them again.
    """
    monkeypatch.setenv("MM_SELF_CHECK", "1")
    block = BLOCKS.parse("prenorm").build(
        32, MIXERS.parse("attention").build(32), FFNS.parse("swiglu").build(32)
    )
    init_weights(block)
    layout = Layout.from_rows([[Doc(7), Doc(9)], [Doc(16)]], 16)
    ctx, x = Ctx(layout, Causal()), torch.randn(2, 16, 32)
    found = []
    for call in (partial(recompute.run, mode, block), block):
        for op in Op.every.values():
            op._checked.clear()
        inputs = x.clone().requires_grad_()
        loss = call(inputs, ctx, None).y.square().sum()
        found.append(torch.autograd.grad(loss, [inputs, *block.parameters()]))
    assert any(op._checked for op in Op.every.values())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _run(out: Path, name: str, **engine: Any) -> Run:
    toys.vocabulary().save(out / "vocabulary.json")
    backbone = {
        "pattern": engine.pop("pattern", "rg_lru attention"),
        "mixers": {"attention": {"heads": 2}, "rg_lru": {"heads": 2}},
        "ffn": {"kind": "swiglu", "hidden": 32},
        "block": {"kind": "prenorm", "dropout": 0.1},
        "recompute": engine.pop("recompute", "none"),
    }
    return Run.model_validate(
        {
            "name": name,
            "out": out,
            "vocabulary": out / "vocabulary.json",
            "model": {"kind": "lm", "d_model": 16, "backbone": {"kind": "stack", **backbone}},
            "stages": [
                {
                    "data": {"kind": "toy", "micro": 4},
                    "objective": "next_token",
                    "budget": {"steps": 3},
                    "schedule": {"warmup": 2},
                    "optimizer": {"kind": "adamw", "lr": 1e-2},
                }
            ],
            "engine": {"precision": "fp32", **engine},
        }
    )


@pytest.mark.parametrize("stage", only([1, 3], 1))
def test_a_recomputed_run_is_the_plain_run(tmp_path: Path, stage: int) -> None:
    """Losses and gradient norms of every step, to the bit; an earlier config said true or false."""
    plain = _run(tmp_path, "plain", zero_stage=stage)
    train(plain)
    for mode in ("full", "selective"):
        run = _run(tmp_path, mode, zero_stage=stage, recompute=mode)
        train(run)
        assert losses(run) == losses(plain)
        norms = [[row["optim/grad_norm"] for row in rows(r)] for r in (run, plain)]
        assert norms[0] == norms[1]
    for old, new in ((True, "full"), (False, "none")):
        assert _run(tmp_path, "old", recompute=old).model.backbone.recompute == new
    assert train(_run(tmp_path, "full", zero_stage=stage))["new_steps"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_compiled_run_is_the_plain_run_to_rounding(tmp_path: Path, mode: str) -> None:
    """Attention, plain and recomputed; the graphs are there."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    plain = _run(tmp_path, "plain", zero_stage=1, pattern="attention")
    train(plain)
    reset()
    counters.clear()
    run = _run(
        tmp_path, "compiled", zero_stage=1, pattern="attention", recompute=mode, compile=True
    )
    train(run)
    assert counters["stats"]["unique_graphs"] >= 1
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    norms = [[row["optim/grad_norm"] for row in rows(r)] for r in (run, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    a, b = (toys.load_file(str(r.folder / "model" / "model.safetensors")) for r in (run, plain))
    assert a.keys() == b.keys()


def test_compile_is_refused_by_name_at_stage_3(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="set engine.zero_stage to 0, 1 or 2"):
        _run(tmp_path, "no", zero_stage=3, compile=True)
