"""A network filled module by module, so that one module of it at a time need be whole.

It is built with its parameters on the meta device. A block, an embedder, a head or an adapter is
filled as one; what holds those is run again for each of them, as it may rescale them, and finds the
others without values: on the meta device, or cut. A network that fills all of its own, as a
tokenizer does, is one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mm.errors import UserError
from mm.model.initial_weights import children_first, fill
from mm.model.layer import Backbone
from mm.model.model import Model

SCALE = (Model, Backbone)  # their ``init_weights`` only scales what it holds
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Unit(NamedTuple):
    """What is filled as one.

    Attributes:
        name: of its module.
        parts: modules whose tensors it has, children first; their names.
        above: modules that hold it, the nearest first; their names.
    """

    name: str
    parts: list[tuple[str, nn.Module]]
    above: list[tuple[str, nn.Module]]


def build_empty(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """What ``build`` makes, its parameters on the meta device, its buffers on ``device``."""

    def empty(module: nn.Module, name: str, p: nn.Parameter | None) -> nn.Parameter | None:
        if p is None or p.is_meta:
            return None
        return nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)

    hook = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        with torch.device(device):
            return build()
    finally:
        hook.remove()


def units(network: nn.Module) -> list[Unit]:
    """The units of a network, in the order of its modules; what holds others is one itself."""
    return list(_units(network, "", []))


def _units(module: nn.Module, name: str, above: list[tuple[str, nn.Module]]) -> Iterator[Unit]:
    holds = isinstance(module, LISTS) or not (above or hasattr(module, "init_weights"))
    if not holds and not isinstance(module, SCALE):
        yield Unit(name, list(children_first(module, name)), above)
        return
    inside = [(name, module), *above]
    for key, child in module.named_children():
        yield from _units(child, f"{name}.{key}" if name else key, inside)
    yield Unit(name, [(name, module)], above)


def fill_by_module(
    network: nn.Module, device: torch.device, seed: int, only: Collection[str] | None = None
) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Fill a network of `build_empty`, with the weights of `init_weights`.

    Yields the name of each unit and its parameters, whole on ``device``, those that no unit before
    had. They may be cut then: they are not asked for again. A parameter stays the same object.

    Args:
        only: tensors of which a unit must have one; of the others none is filled.
    Raises:
        UserError: ``init_weights`` leaves a parameter unfilled.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    for unit in units(network):
        if only is not None and not any(name in only for name in _names_of(unit, names)):
            continue
        found: dict[str, nn.Parameter] = {}
        for _, module in unit.parts:
            for p in module.parameters(recurse=False):
                if p.is_meta:
                    _allocate(p, device)
                    found[names[id(p)]] = p
        hidden = _buffers_hidden(network, but=[module for _, module in unit.parts])
        with torch.device(device), hidden:
            for name, module in (*unit.parts, *unit.above):
                fill(module, name, seed)
        for name, p in found.items():
            if p.is_floating_point() and bool(p.detach().isnan().any()):
                raise UserError(
                    f"'{name}' has no initial values: init_weights of its module, or of one that "
                    "holds it, has to fill it"
                )
        if found:
            yield unit.name, found


def _names_of(unit: Unit, names: Mapping[int, str]) -> Iterator[str]:
    """Names of the tensors of a unit, a parameter by that of ``names``."""
    for path, module in unit.parts:
        yield from (names[id(p)] for p in module.parameters(recurse=False))
        yield from (f"{path}.{key}" if path else key for key in module._buffers)


@contextmanager
def _buffers_hidden(network: nn.Module, but: Collection[nn.Module]) -> Iterator[None]:
    """Keep what scales a unit from scaling buffers of the others again (those of NF4 are weights).

    They are on the meta device meanwhile; those of ``but`` stay.
    """
    mine = set(but)
    kept = [(m, dict(m._buffers)) for m in network.modules() if m not in mine and m._buffers]
    for module, buffers in kept:
        module._buffers.update({k: None if b is None else b.to("meta") for k, b in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


def _allocate(p: nn.Parameter, device: torch.device) -> None:
    """Give a parameter memory; whoever holds it, an optimizer or a tied head, holds it still."""
    values = torch.empty_like(p, device=device, requires_grad=False)
    real = nn.Parameter(values, requires_grad=p.requires_grad)
    if real.is_floating_point():
        real.data.fill_(float("nan"))
    vars(real).update(vars(p))  # type: ignore[union-attr]
    torch.utils.swap_tensors(p, real)
