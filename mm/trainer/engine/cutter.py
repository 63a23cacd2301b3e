"""Parameters in slices of ZeRO stage 3 from the start: no process holds the whole network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.engine_config import EngineConfig
from mm.model.slices import Slice, slice_of
from mm.trainer.engine.deepspeed import Read, communicating, near_group, settings_here
from mm.trainer.engine.on_disk import slice_in_memory


class Cutter:
    """Cuts parameters as they are filled.

    Attributes:
        frozen: name -> this rank's fp32 slice of a parameter that does not train, on the host,
            where DeepSpeed rounds all to bf16.
    """

    _first: Any = None  # of those that are cut

    def __init__(self, config: EngineConfig, precision: str, n_params: int):
        self._json = settings_here(config, precision, n_params)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.frozen: dict[str, Tensor] = {}

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Cut whole parameters by their names. Call on all ranks with the same ones."""
        for name, p in parameters.items():
            if self._dtype != p.dtype:
                if not p.requires_grad:
                    self.frozen[name] = self._slice(p).to("cpu", copy=True)
                p.data = p.data.to(self._dtype)
        params = list(parameters.values())
        with communicating() as deepspeed:
            if self._first is None:
                self._first = params[0]
                config = {"config_dict_or_path": self._json, "dtype": self._dtype}
                config["zero_param_parallel_group"] = near_group()
                deepspeed.zero.Init(module=nn.ParameterList(params), **config)
            else:
                self._first.convert_to_zero_parameters(params)

    def _slice(self, p: Tensor) -> Tensor:
        part = _part(p.numel())
        return p.reshape(-1)[part.start : part.start + part.n]

    @torch.no_grad()
    def load(self, module: nn.Module, read: Read) -> None:
        """Set the slices that this rank holds; no other values are read.

        Args:
            module: whose parameters are all cut, and whose buffers are whole.
            read: elements ``start : start + n`` of a parameter or buffer, on the host.
        """
        for name, p in module.named_parameters():
            part = _part(p.ds_numel)  # type: ignore[attr-defined]
            if not part.n:
                continue
            values = read(name, part.start, part.n)
            with slice_in_memory(p, changed=True):
                p.ds_tensor[: part.n].copy_(values)  # type: ignore[attr-defined]
            if name in self.frozen:
                self.frozen[name] = values.to(self.frozen[name].dtype)


def _part(numel: int) -> Slice:
    """This rank's slice of a parameter, as DeepSpeed cuts it."""
    size = -(-numel // dist.get_world_size())
    return slice_of(dist.get_rank(), numel, 0, size, True)
