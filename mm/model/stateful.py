"""What owns a State. N slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mm.state import State, join_parts

M = TypeVar("M", bound=nn.Module)


class Stateful(nn.Module):
    """What may own a State: a layer, or a part of one such as a short convolution."""

    # Takes documents of a packed call apart, by `per_document` or `document_groups`, even where
    # rows stay as they are (`mm.model.length_buckets.stays_flat`).
    documents_apart: bool = False

    def stateful_parts(self) -> list[Stateful]:
        """The nearest ones below, in the order in which they were assigned."""
        return list(nearest(self, Stateful))

    def initial_state(self, n: int, max_len: int) -> State | None:
        """State of ``n`` fresh slots that will hold at most ``max_len`` tokens; None without one.

        That of its parts (`join_parts`), unless it says otherwise.
        """
        return join_parts(*(part.initial_state(n, max_len) for part in self.stateful_parts()))

    def state_bytes(self, n: int, max_len: int) -> int:
        """Bytes of `initial_state(n, max_len)`, for which no memory is taken."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            state = self.initial_state(n, max_len)
        return state.n_bytes() if state is not None else 0


class StatePart(Stateful):
    """A part of a layer that owns a State and perhaps no parameter."""

    like: Tensor  # (0,) of the dtype and on the device of the parameters around

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)

    @property
    def wide(self) -> torch.dtype:
        """What recurrences are kept and moved in: float32 or wider."""
        return torch.promote_types(self.like.dtype, torch.float32)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A leaf of zeros, float32 or wider unless ``dtype`` says otherwise."""
        return self.like.new_zeros(*shape, dtype=dtype or self.wide)


def nearest(module: nn.Module, kind: type[M]) -> Iterator[M]:
    """The nearest modules of a kind below a module."""
    for child in module.children():
        if isinstance(child, kind):
            yield child
        else:
            yield from nearest(child, kind)
