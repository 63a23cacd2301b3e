"""DeepSpeed's engine alone: what a step does around it, and what is cut for ZeRO stage 3."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mm.run import EngineConfig
from mm.schedule import Ema
from mm.trainer.engine import cutter
from mm.trainer.engine.deepspeed import Engine


def engine(applied: bool = True, norm: float = 3.0, **more: Any) -> tuple[Engine, torch.Tensor]:
    """An engine whose DeepSpeed adds 1 to its two weights, and these weights."""
    made = Engine.__new__(Engine)
    x = torch.zeros(2)
    made.ds = SimpleNamespace(  # type: ignore[assignment]
        step=lambda: x.add_(1.0) if applied else None,
        was_step_applied=lambda: applied,
        get_global_grad_norm=lambda: norm,
    )
    made.updates, made.ema, made.grad_clip = 0, None, 1.0
    made.shards = SimpleNamespace(spans={x: []})  # type: ignore[assignment]
    for name, value in more.items():
        setattr(made, name, value)
    made._averages = {}
    made._restart_averages()
    return made, x


def test_an_average_follows_every_update_that_was_applied() -> None:
    """It keeps (1 + n) / (10 + n) after n updates, and 0.15 at most: 0.1, 2 / 11 cut to 0.15."""
    made, x = engine(ema=Ema(decay=0.15))
    assert made.step(None) == (True, 3.0)
    assert made._averages[x].tolist() == pytest.approx([0.9] * 2)  # 0.1 * 0 + 0.9 * 1
    made.step(None)
    assert made._averages[x].tolist() == pytest.approx([0.15 * 0.9 + 0.85 * 2] * 2)
    assert made.updates == 2
    made, x = engine(applied=False, ema=Ema())
    assert made.step(None) == (False, float("inf"))
    assert made._averages[x].tolist() == [0.0] * 2 and made.updates == 0


def test_what_does_not_train_is_kept_in_fp32_when_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of two processes holds the last two of five numbers, unrounded."""
    cut: list[int] = []
    init = lambda module, **more: cut.extend(p.numel() for p in module.parameters())
    found = SimpleNamespace(zero=SimpleNamespace(Init=init))
    monkeypatch.setattr(cutter, "communicating", lambda: contextlib.nullcontext(found))
    monkeypatch.setattr(cutter.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(cutter.dist, "get_rank", lambda: 1)
    values = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4])
    for precision, kept in (
        ("bf16", {"still": [values[3].item(), values[4].item()]}),
        ("fp32", {}),
    ):
        parameters: Mapping[str, nn.Parameter] = {
            "trained": nn.Parameter(torch.zeros(3)),
            "still": nn.Parameter(values.clone(), requires_grad=False),
        }
        made = cutter.Cutter(EngineConfig(zero_stage=3), precision, 8)
        made(parameters)
        assert {name: part.tolist() for name, part in made.frozen.items()} == kept
        dtypes = {p.dtype for p in parameters.values()}
        assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert cut == [3, 5] * 2
