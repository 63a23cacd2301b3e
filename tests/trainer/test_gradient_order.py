"""Gradients that are ready in another order in one process are found before ZeRO sums them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from mm.errors import UserError
from mm.trainer.engine.gradient_order import GradientOrder


class Branches(nn.Module):
    """A sum, whose parts run in the order that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor, order: str) -> torch.Tensor:
        return torch.stack([getattr(self, name)(x) for name in order]).sum()


def rank(number: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    module, x, said = Branches(), torch.ones(1, 2), []
    for orders in (("ab", "ab"), ("ab", "ba"), ("ab", "a"), ("a", "ab")):
        looks = GradientOrder(module.named_parameters())
        module(x, orders[number]).backward()
        try:
            looks.check(torch.device("cpu"))
            said.append("")
        except UserError as error:
            said.append(str(error))
    module(x, "ba").backward()  # nobody looks any more
    Path(f"{out}.{number}").write_text("\n".join(said))
    dist.destroy_process_group()


@pytest.mark.slow
def test_another_order_is_refused_in_all_processes_by_the_first_name(tmp_path: Path) -> None:
    spawn(rank, args=(str(tmp_path / "store"), str(tmp_path / "said")), nprocs=2)
    first, second = ((tmp_path / f"said.{r}").read_text().split("\n") for r in (0, 1))
    assert first == second and first[0] == ""
    # Backward runs first what ran last.
    for text, name in zip(first[1:], ("b.weight", "b.weight", "a.weight"), strict=True):
        assert f"from '{name}' on" in text and "engine.zero_stage=1" in text
