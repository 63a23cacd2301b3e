"""Whether a network fits the machine, asked before any of it is built. Meta device: no bytes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mm.errors import UserError
from mm.launch import environment

FLOAT32 = 4  # bytes
NO_MEMORY = ("allocate memory", "overflow", "out of range", "too large", "int_max")


class _TooLarge(Exception):
    """Its argument is the bytes of the parameters that were made so far."""


def memory_bytes(device: torch.device) -> int:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return environment.memory_bytes()


def require_room(
    build: Callable[[], nn.Module], copies: float, device: torch.device, origin: str
) -> None:
    """Raise UserError where ``copies`` of a network's parameters take more than ``device`` has.

    Args:
        build: makes the network; called on the meta device and stopped at the first excess.
        copies: in float32; 2: weights and gradients; a part of that, where each process has one.
    """
    have = memory_bytes(device)
    most: list[tuple[int, str]] = []  # the largest parameter: its bytes, its name and shape
    total = 0

    def count(module: nn.Module, name: str, parameter: torch.Tensor | None) -> None:
        nonlocal total
        if parameter is None:
            return
        n_bytes = math.ceil(copies * FLOAT32 * math.prod(parameter.shape))
        total += n_bytes
        if not most or n_bytes > most[0][0]:
            shape = " x ".join(map(str, parameter.shape))
            most[:] = [(n_bytes, f"{type(module).__name__}.{name} of {shape}")]
        if total > have:
            raise _TooLarge(total)

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            build()
    except (_TooLarge, MemoryError, OverflowError, RuntimeError, TypeError) as error:
        text = str(error).lower()
        if isinstance(error, (RuntimeError, TypeError)) and not any(w in text for w in NO_MEMORY):
            raise
        known = isinstance(error, _TooLarge)
        least = f"{total / 2**30:,.0f} GiB" if known else "more than can be counted"
        largest = f" (the largest so far: {most[0][1]})" if most else ""
        raise UserError(
            f"{origin}: its parameters take {least} or more{largest}, this machine has "
            f"{have / 2**30:,.0f} GiB: lower d_model, hidden, the depth or the vocabulary"
        ) from error
    finally:
        hook.remove()
