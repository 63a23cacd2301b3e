"""DeepSpeed's engine alone: what a step does around it, and what is cut for ZeRO stage 3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
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


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This process is the second of two; what DeepSpeed is asked to cut, by the call it is in."""
    cut: list[str] = []

    def convert(parameters: Iterable[nn.Parameter]) -> None:
        cut.extend(f"more {p.numel()}" for p in parameters)

    def init(
        module: nn.ParameterList,
        config_dict_or_path: Any,
        dtype: torch.dtype,
        zero_param_parallel_group: Any,
    ) -> None:
        assert config_dict_or_path["zero_optimization"]["stage"] == 3
        cut.extend(f"first {p.numel()} {dtype}" for p in module)
        module[0].convert_to_zero_parameters = convert  # type: ignore[attr-defined]

    found = SimpleNamespace(zero=SimpleNamespace(Init=init))
    monkeypatch.setattr(cutter, "communicating", lambda: contextlib.nullcontext(found))
    monkeypatch.setattr(cutter.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(cutter.dist, "get_rank", lambda: 1)
    return cut


VALUES = (1.0, 1.1, 1.2, 1.3, 1.4)


def parts() -> dict[str, nn.Parameter]:
    still = nn.Parameter(torch.tensor(VALUES), requires_grad=False)
    return {"trained": nn.Parameter(torch.zeros(3)), "still": still}


def test_what_does_not_train_is_kept_in_fp32_when_it_is_cut(second_of_two: list[str]) -> None:
    """Of five numbers the second process holds the last two, unrounded; DeepSpeed rounds all."""
    made = cutter.Cutter(EngineConfig(zero_stage=3), "bf16", 8)
    cut = parts()
    made(cut)
    assert {name: part.tolist() for name, part in made.frozen.items()} == {
        "still": torch.tensor(VALUES)[3:].tolist()
    }
    assert not any(part.requires_grad for part in made.frozen.values())
    assert {p.dtype for p in cut.values()} == {torch.bfloat16}
    made({"last": nn.Parameter(torch.zeros(4))})
    bf16 = torch.bfloat16
    assert second_of_two == [f"first 3 {bf16}", f"first 5 {bf16}", "more 4"]


def test_in_fp32_nothing_is_kept_twice(second_of_two: list[str]) -> None:
    made = cutter.Cutter(EngineConfig(zero_stage=3), "fp32", 8)
    cut = parts()
    made(cut)
    assert made.frozen == {} and {p.dtype for p in cut.values()} == {torch.float32}


def test_of_parameters_that_are_cut_only_the_own_slices_are_read(second_of_two: list[str]) -> None:
    """The second process has 3 of 5 numbers' last two; of a single number it has none."""
    read = []

    def values(name: str, start: int, n: int) -> torch.Tensor:
        read.append((name, start, n))
        return torch.arange(start, start + n) + 0.1

    module = nn.Module()
    for name, n in (("five", 5), ("one", 1)):
        p = nn.Parameter(torch.zeros(0, dtype=torch.bfloat16), requires_grad=False)
        p.ds_numel, p.ds_tensor = n, torch.zeros(-(-n // 2))  # type: ignore[attr-defined]
        module.register_parameter(name, p)
    made = cutter.Cutter(EngineConfig(zero_stage=3), "bf16", 6)
    made.frozen["five"] = torch.zeros(2)
    made.load(module, values)
    want = torch.tensor([3.1, 4.1])
    assert read == [("five", 3, 2)]
    assert torch.equal(module.five.ds_tensor, torch.cat([want, torch.zeros(1)]))  # type: ignore[attr-defined]
    assert torch.equal(made.frozen["five"], want)
    assert not module.one.ds_tensor.any()  # type: ignore[attr-defined]
