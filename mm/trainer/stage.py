"""Networks of a stage: which ones, built, filled, compiled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.model.layer import Block, init_weights
from mm.objectives.objective import Network, Objective
from mm.run import Run


def build(config: Config, **offered: Any) -> Any:
    """Call ``config.build`` with those of ``offered`` that it names: a build declares only what it
    needs.
    """
    known = inspect.signature(config.build).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return config.build(**{k: v for k, v in offered.items() if takes_all or k in known})


def all_networks(run: Run, objective: Objective) -> dict[str, Network]:
    """The model and the objective's own networks.

    An average takes the config of what it follows where it has none. Raises UserError when that is
    not a trained network.
    """
    networks = {"model": Network(run.model), **objective.networks}
    for name, network in networks.items():
        if network.mode == "ema":
            of = networks.get(network.of or "")
            if of is None or of.mode != "train":
                raise UserError(
                    f"objective: network '{name}' follows '{network.of}', which is not trained"
                )
            networks[name] = network._replace(config=network.config or of.config)
    return networks


def make_module(config: Config, vocabulary: Any, seed: int, device: torch.device) -> nn.Module:
    """Build and fill a network; the same weights on every rank."""
    torch.manual_seed(seed)
    with torch.device(device):
        module = build(config, vocabulary=vocabulary)
        init_weights(module)
    return module


def compile_blocks(module: nn.Module) -> None:
    """Let torch.compile make code of every block of a network (of all of it, if it has none), in
    place: names and parameters stay.

    Blocks of one config share their code. A block whose documents have a new shape is compiled
    once more, then for all shapes.
    """
    import torch._dynamo.config as dynamo

    parts = [m for m in module.modules() if isinstance(m, Block)] or [module]
    # each kind of block twice or more, all under the one `forward` of their class
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(parts))
    for part in parts:
        part.compile()


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy full tensors into parameters and buffers.

    Raises UserError when a name or shape does not fit.
    """
    own = module.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            have = tuple(own[name].shape) if name in own else "absent"
            raise UserError(
                f"{origin}: '{name}' is {tuple(tensor.shape)} there and {have} in the model; "
                "it was made by another model config: use another run name"
            )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    unset = {n for n, _ in module.named_parameters()} - set(weights)
    if unset:
        raise UserError(
            f"{origin}: has no '{min(unset)}'; it was made by another model config: "
            "use another run name"
        )
