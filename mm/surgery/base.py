"""Surgery: a trained model as another one, a pure function of its config and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.vocabulary import Vocabulary

LAYERS = "backbone.layers."


class Operated(NamedTuple):
    """A network between two operations."""

    config: Any
    tensors: dict[str, Tensor]
    vocabulary: Vocabulary | None  # of its tables of ids


class Surgery(Config):
    """Plug point; `init_from.surgery` is a list of them, done in order."""

    keeps_function: ClassVar[bool] = False  # the network computes the same afterwards

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        """The network after the operation.

        Args:
            before: of the folder, or of the operation before.
            wanted: the vocabulary of the run that begins with it.
        Raises:
            UserError: the network has not what is operated on.
        """
        raise NotImplementedError


def network_of(it: Operated, seed: int = 0) -> nn.Module:
    """The network with its tensors, in eval mode on the CPU; those that it lacks begin fresh."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = it.config.build(it.vocabulary)
        init_weights(module)
    module.load_state_dict(it.tensors, strict=False)
    return module.eval()


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a network."""
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def stack_of(config: Any, kind: str) -> Any:
    """The backbone of a language model. Raises UserError where it is no plain stack."""
    backbone = getattr(config, "backbone", None)
    if getattr(backbone, "kind", None) != "stack":
        raise UserError(f"surgery '{kind}' needs a language model whose backbone is a stack")
    return backbone


def with_stack(config: Any, **changes: Any) -> Any:
    """The config with other settings of its stack, validated again."""
    stack = type(config.backbone).model_validate(config.backbone.to_dict() | changes)
    return config.model_copy(update={"backbone": stack})


def move_layers(tensors: Mapping[str, Tensor], to: Mapping[int, list[int]]) -> dict[str, Tensor]:
    """Tensors with layer i as each of the layers ``to[i]``; those of other layers are left out."""
    out = {}
    for name, tensor in tensors.items():
        if not name.startswith(LAYERS):
            out[name] = tensor
            continue
        number, _, rest = name.removeprefix(LAYERS).partition(".")
        out |= {f"{LAYERS}{j}.{rest}": tensor.clone() for j in to.get(int(number), [])}
    return out
