"""States of documents that go on in the next batch: of every row, carried from step to step.

A stream with ``carried_rows`` (`mm.data.streams.stateful`) makes the trainer call the model with
the State that the row's last window left. Back-propagation stops at the border of a step.
Checkpoints hold the States of all rows in their order, so another number of processes takes its
own ones.
N rows of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.errors import UserError
from mm.model.layer import Mixer, ModelOut
from mm.model.slices import Placed
from mm.model.tensor_file import DTYPES
from mm.state import State
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.checkpoint.held import Held, whole
from mm.trainer.engine.deepspeed import Engine

FILE = "carried_states"  # of the checkpoint, beside the networks' own


class CarriedStates:
    """States of this rank's rows.

    Args:
        initial: fresh States of them, N slots.
        mine: rows of every micro-batch, contiguous over them (`rank_rows`).
    """

    def __init__(self, initial: State, mine: Sequence[range]):
        self.state = initial
        self._mine = mine
        self._first = mine[0].start
        self._made: dict[int, State] = {}

    @classmethod
    def of(
        cls, stream: Any, engine: Engine, autocast: AbstractContextManager[Any]
    ) -> CarriedStates | None:
        """Fresh ones for a stream that carries rows, else None. Call on all ranks.

        Raises UserError when the model has no State.
        """
        if not getattr(stream, "carried_rows", 0):
            return None
        with engine.unsharded() as module, autocast:
            _require_states(module)
            make: Any = module.initial_state
            state = make(sum(map(len, stream.own_rows)), stream.max_length)
        return cls(state, stream.own_rows)

    def before(self, micro: int) -> State:
        """A copy of the States that micro-batch ``micro`` of this step begins from."""
        if micro < 0:
            raise ValueError("the model ran on a batch that is none of the step's: whose State?")
        rows = self._mine[micro]
        at = torch.arange(rows.start - self._first, rows.stop - self._first)
        return self.state.select(at.to(next(self.state.leaves()).device))

    def after(self, micro: int, out: ModelOut) -> None:
        """Note what micro-batch ``micro`` left; `commit` makes it the rows' State."""
        assert out.state is not None
        self._made[micro] = out.state.detach()

    def commit(self, applied: bool) -> None:
        """End a step. One that was not applied leaves the rows as they were: it is not finite."""
        made, self._made = self._made, {}
        if applied and made:
            first, *rest = (made[i] for i in range(len(self._mine)))
            self.state = first.cat(*rest) if rest else first

    def own_rows(self) -> dict[str, Held]:
        """This rank's rows of the leaves of all rows' States, in the order of the rows."""
        return {f"{i:03d}": self._held(leaf.detach()) for i, leaf in enumerate(self.state.leaves())}

    def _held(self, leaf: Tensor) -> Held:
        world = dist.get_world_size() if dist.is_initialized() else 1
        shape = (world * len(leaf), *leaf.shape[1:])
        if not leaf.numel():
            return whole(leaf.new_empty(shape))
        mine = leaf.reshape(-1) if world > 1 else leaf
        return Held(Placed(shape, DTYPES[leaf.dtype], None, 0, leaf.numel(), True), mine)

    def load(self, snapshot: Snapshot) -> None:
        """Take this rank's rows from a checkpoint, made by any number of processes."""
        shapes = snapshot.tensors(FILE).shapes
        own = list(self.state.leaves())
        if len(shapes) != len(own):
            raise UserError(
                f"{snapshot.origin}: holds {len(shapes)} State tensors a row, the model has "
                f"{len(own)}: use another run name: name=..."
            )
        names = iter(sorted(shapes))

        def rows(leaf: Tensor) -> Tensor:
            n = leaf.numel()
            found = snapshot.read(FILE, next(names), n // len(leaf) * self._first, n)
            return found.view(leaf.shape).to(leaf.device, leaf.dtype)

        self.state = self.state.map(rows)


def _require_states(module: nn.Module) -> None:
    if not hasattr(module, "initial_state"):
        raise UserError(
            f"data 'stateful': a {type(module).__name__} carries no State between batches"
        )
    for name, part in module.named_modules():
        if isinstance(part, Mixer) and not part.caps.step:
            raise UserError(
                f"data 'stateful': {name} ({type(part).__name__}) has no State to carry to the "
                "next batch; use another mixer, or data 'packed'"
            )
