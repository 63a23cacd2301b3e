"""Initial weights: a function of a seed and of the name of the module that fills them.

So a layer has the same ones whatever else is built, before it or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn


def children_first(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Every module below, each once and under its first name, then ``module`` itself."""
    seen = set() if seen is None else seen
    seen.add(module)
    for key, child in module.named_children():
        if child not in seen:
            yield from children_first(child, f"{name}.{key}" if name else key, seen)
    yield name, module


def fill(module: nn.Module, name: str, seed: int) -> None:
    """Run the ``init_weights`` of one module, on random numbers of its own.

    Of torch's own modules it is ``reset_parameters``; one without either is left as it is.
    """
    own = getattr(module, "init_weights", getattr(module, "reset_parameters", None))
    if callable(own):
        _seed(key_of(seed, name))
        own()


def fill_all(module: nn.Module, seed: int | None) -> None:
    """`fill` every module, parents after children; ``seed`` None: of the global generator.

    That is left as the seed says, whatever was filled.
    """
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    for name, part in children_first(module):
        fill(part, name, seed)
    _seed(seed)


def _seed(seed: int) -> None:
    # torch.manual_seed asks every kind of device, for every module
    (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(
        seed
    )


def key_of(seed: int, name: str) -> int:
    """Seed of a module's own random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
