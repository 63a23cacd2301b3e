"""Blocks as Inductor compiles them for a GPU give the outputs and gradients of eager mode.

Its H100 code, forward and backward, runs on the CPU with kernels interpreted: the graphs, the
layouts that operators of this project promise, and kernels that combine others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from laws import ROOT

pytest.importorskip("triton")

from inductor_oracle import Call, compiled, first_calls
from triton_oracle import interpreted

from mm import config as yaml_config
from mm.kernels.attention import attention
from mm.model import length_buckets
from mm.model.backbones.stack import presets
from mm.plan.inputs import Assumed, open_subject

TOKENS, DOCUMENT, WIDTH, IDS = 96, 64, 64, 128
# Hundreds of kernels a block, minutes interpreted; two of them were right (lab notes).
LONG = {"plstm_diffusion", "cross_scan_mamba", "lssl"}
WALKS = {"low_rank_gru", "ttt_mlp", "capped_mamba2"}  # over the tokens: not compiled
BACKBONES_OF = {f.stem: f for f in sorted((ROOT / "configs" / "backbone").glob("*.yaml"))}


def gradients(call: Call, run: Any, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What ``run`` makes of a call, then the gradients of its input and of every weight."""
    x = call.args[0].detach().requires_grad_()
    for p in call.block.parameters():
        p.grad = None
    y = run(call._replace(args=(x, *call.args[1:])))
    (y * weight).sum().backward()
    yield "y", y.detach()
    for name, given in (("x", x), *call.block.named_parameters()):
        if given.grad is not None:
            yield name, given.grad.clone()


def agree(backbone: Any, combo_kernels: bool = True) -> None:
    """Each block's results within what bf16 rounds, beside eager mode in float32."""
    from launch_budget import run_of  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    run = run_of(backbone, WIDTH, TOKENS, combo_kernels)
    subject = open_subject(run, 0, "autocast_bf16", Assumed(DOCUMENT, IDS))
    micro = subject.batches(1)[0]
    vary = lambda batch: dataclasses.replace(batch, ids=torch.randint_like(batch.ids, 18, IDS))
    micro = vary(micro)
    micro = dataclasses.replace(micro, parts={name: vary(x) for name, x in micro.parts.items()})
    calls = first_calls(run, subject.vocabulary, micro, torch.device("cpu"))
    graphs = compiled(run, subject.vocabulary, micro, run.engine.compile_options("cuda"))
    assert any(graphs)
    for call, graph in zip(calls, graphs, strict=True):
        if graph is None:  # it walks over the tokens, and is not compiled
            continue
        x = torch.randn_like(call.args[0])
        weight = torch.randn_like(x)
        call = call._replace(args=(x, *call.args[1:]))
        eager = lambda c: c.block(*c.args, **c.kwargs).y
        if eager(call) is x:  # it only publishes
            continue
        exact = dict(gradients(call, eager, weight))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = dict(gradients(call, eager, weight))
        with interpreted():
            found = dict(gradients(call, graph, weight))
        assert found.keys() == exact.keys()
        for name, y in exact.items():
            size = y.norm().clamp_min(1e-6)
            error, usual = ((x[name].float() - y).norm() / size for x in (found, rounded))
            bound = max(0.05, 2 * usual)
            assert error < bound, f"{type(call.block).__name__} {name}: {error:.1e} of {bound:.1e}"


@pytest.fixture(autouse=True)
def _as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat rows, and attention of this project: that of the card's libraries is not on a CPU."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(length_buckets, "FLAT", True)
    monkeypatch.setattr(attention, "order", lambda *_, **__: ["triton", "blocks", "reference"])


@pytest.mark.parametrize(
    "combo_kernels", [pytest.param(False, marks=pytest.mark.slow), True], ids=["apart", "combined"]
)
def test_the_hybrid(combo_kernels: bool) -> None:
    agree({"kind": "stack", "pattern": "gated_deltanet attention"}, combo_kernels)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES_OF)
def test_every_backbone(name: str) -> None:
    agree(yaml_config.read(BACKBONES_OF[name]))


@pytest.mark.slow
@pytest.mark.parametrize("word", [w for w in presets() if w not in LONG | WALKS])
def test_every_preset(word: str) -> None:
    backbone = {"kind": "stack", "pattern": word, "ffn": {"kind": "swiglu", "hidden": 32}}
    agree(backbone)
