"""Weights that a network begins with: fresh, seeded by codes, of a snapshot, of another run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from mm.errors import UserError
from mm.model.by_module import fill_by_module
from mm.model.slices import shapes_of
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.engine.cutter import Cutter
from mm.trainer.engine.deepspeed import Read
from mm.trainer.fit_weights import Rows

Weights = Mapping[str, Tensor]
SEEDED = "embedder."  # what `prepare` of a model's config changes begins so


def load_weights(
    module: nn.Module, weights: Weights, origin: str, mend: str = Snapshot.mend
) -> None:
    """Copy full tensors into parameters and buffers.

    Raises UserError with ``mend`` when a name or shape does not fit.
    """
    require_fit(module, weights, origin, mend)
    fill_whole(module, weights)


def require_fit(
    module: nn.Module,
    weights: Weights,
    origin: str,
    mend: str = Snapshot.mend,
    fresh: Collection[str] = (),
) -> None:
    """Check names and shapes of what a network begins with; ``fresh`` ones need not be there.

    Raises UserError with ``mend``. No value is read: the network may be on the meta device.
    """
    own = module.state_dict(keep_vars=True)
    for name, shape in shapes_of(weights).items():
        if name not in own or own[name].shape != shape:
            have = tuple(own[name].shape) if name in own else "absent"
            raise UserError(
                f"{origin}: '{name}' is {tuple(shape)} there and {have} in the model; {mend}"
            )
    unset = {n for n, _ in module.named_parameters()} - {*weights, *fresh}
    if unset:
        raise UserError(f"{origin}: has no '{min(unset)}'; {mend}")


@torch.no_grad()
def fill_whole(
    module: nn.Module, weights: Weights, prepare: Callable[[], None] | None = None
) -> None:
    """Seed rows by codes, then copy what is given; one tensor of it is read at a time."""
    if prepare is not None:
        prepare()
    own = module.state_dict(keep_vars=True)
    for name in weights:
        _put(own[name], weights[name])


@torch.no_grad()
def fill_cut(
    module: nn.Module,
    device: torch.device,
    seed: int,
    cutter: Cutter,
    weights: Weights,
    prepare: Callable[[], None] | None = None,
    read: Read | None = None,
) -> None:
    """Fill a network of `build_empty` module by module, each cut before the next is whole.

    Args:
        seed: of what begins fresh.
        weights: tensors to begin with.
        prepare: seeds rows by codes.
        read: in place of ``weights``: ranges of them, of which those that this rank holds are read.
    """
    buffers = {name for name, _ in module.named_buffers()}
    left = {name for name in weights if name not in buffers} if read is None else set()
    for _, found in fill_by_module(module, device, seed):
        if prepare is not None and any(name.startswith(SEEDED) for name in found):
            prepare()
        for name in left & found.keys():
            _put(found[name], weights[name])
        left -= found.keys()
        cutter(found)
    assert not left, f"{sorted(left)[:3]} were filled by no module"
    for name, buffer in module.named_buffers():
        if name in weights:
            _put(buffer, weights[name])
    if read is not None:
        cutter.load(module, read)


def _put(into: Tensor, value: Tensor | Rows) -> None:
    if isinstance(value, Rows):
        value.put(into)
    else:
        into.copy_(value)
