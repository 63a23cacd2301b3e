"""Networks that follow others: exponential averages of their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mm.objectives.objective import Network
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.engine.deepspeed import Engine
from mm.trainer.engine.on_disk import slice_in_memory


class Averages:
    """The networks of mode "ema", without gradients: cut as what they follow, or whole.

    After each applied step of what they follow ``average = decay average + (1 - decay) weights``;
    buffers are copied.

    Args:
        networks: all of the stage.
        engines: those that train.
        frozen: raw modules, the averages among them.
        snapshot: what the stage begins from; an average that is not in it, and that no folder
            gives, begins as what it follows. So does a frozen network that follows one.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        engines: Mapping[str, Engine],
        frozen: Mapping[str, nn.Module],
        snapshot: Snapshot | None,
    ):
        self._networks = {k: n for k, n in networks.items() if n.mode == "ema"}
        self._engines, self._frozen = engines, frozen
        for name, network in networks.items():
            given = network.init_from is not None or (snapshot is not None and snapshot.has(name))
            if network.mode != "train" and network.of and not given:
                self._move(name, str(network.of), 0.0)

    def follow(self, source: str) -> None:
        """Move the averages of ``source``. Call on all ranks."""
        for name, network in self._networks.items():
            if network.of == source:
                self._move(name, source, network.decay)

    @torch.no_grad()
    def _move(self, name: str, source: str, decay: float) -> None:
        mine, theirs = self._frozen[name], self._engines[source].raw
        follows = dict(theirs.named_parameters())
        for key, p in mine.named_parameters():
            with slice_in_memory(follows[key]):
                value, other = _held(p), _held(follows[key])
                value.lerp_(other.to(value), 1 - decay)
        buffers = theirs.state_dict(keep_vars=True)
        for key, value in mine.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                value.copy_(buffers[key])


def _held(p: nn.Parameter) -> Tensor:
    """What this process has of a parameter: its slice at ZeRO stage 3, else all."""
    return p.ds_tensor if hasattr(p, "ds_tensor") else p  # type: ignore[attr-defined]
