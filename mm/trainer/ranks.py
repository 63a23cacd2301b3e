"""What all ranks do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mm.errors import UserError
from mm.launch import environment


def on_any(flag: bool, device: torch.device) -> bool:
    """True on all ranks when ``flag`` is on one. Call on all ranks."""
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return bool(total > 0)


def on_main(work: Callable[[], Any], device: torch.device, where: object) -> None:
    """Run ``work`` on the main rank while the others wait. Call on all ranks.

    Raises UserError on all ranks when ``work`` does; ``where`` begins the others' message.
    """
    failed: UserError | None = None
    if environment.ranks().is_main:
        try:
            work()
        except UserError as error:
            failed = error
    if on_any(failed is not None, device):
        raise failed or UserError(f"{where}: the main process stopped, and says why")
