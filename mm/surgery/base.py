"""Surgery: a trained model as another one, a pure function of its config and tensors.

Tensors are made when they are asked for, each of those that it comes from: what an operation needs
in memory does not grow with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.model.by_module import build_empty, fill_by_module
from mm.model.layer import init_weights
from mm.model.slices import Lazy
from mm.vocabulary import Vocabulary

LAYERS = "backbone.layers."
CPU = torch.device("cpu")

# What a tensor is made of: the name of one of the model before, or what makes it.
Source = str | Callable[[], Tensor]


class Operated(NamedTuple):
    """A network between two operations."""

    config: Any
    tensors: Mapping[str, Tensor]
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
    module.load_state_dict(dict(it.tensors), strict=False)
    return module.eval()


def empty_network(config: Any, vocabulary: Vocabulary | None) -> Any:
    """The network on the meta device: its modules and shapes, no values."""
    with torch.device("meta"):
        return config.build(vocabulary)


@torch.no_grad()
def filled_module(network: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> Any:
    """One module of an `empty_network` on the CPU, with its tensors."""
    module = copy.deepcopy(network.get_submodule(path)).to_empty(device=CPU)
    if any(part._non_persistent_buffers_set for part in module.modules()):
        init_weights(module, 0)  # buffers that are not saved
    module.load_state_dict({name: tensors[f"{path}.{name}"] for name in module.state_dict()})
    return module.eval()


class FreshWeights:
    """Those that `network_of` gives what it lacks, one unit of the network at a time.

    Args:
        config, vocabulary: of the network.
        seed: of all its weights.
    """

    def __init__(self, config: Any, vocabulary: Vocabulary | None, seed: int = 0):
        self._build = lambda: build_empty(lambda: config.build(vocabulary), CPU)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._seed = int(torch.randint(2**62, (), device="cpu"))  # as `fill_all` draws it
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._held:
            self._held = {}  # before the next is made
            network = self._build()
            with torch.random.fork_rng(devices=[]):
                for _ in fill_by_module(network, CPU, self._seed, {name}):
                    pass
            own = network.state_dict()
            self._held = {n: t for n, t in own.items() if not t.is_meta}
        return self._held[name]


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a network."""
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def select_tensors(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Lazy:
    """Tensors by other names: ``names`` has the one that each is read by; ties stay."""
    like = on_meta(tensors)
    return Lazy(
        {name: tuple(like[old].shape) for name, old in names.items()},
        lambda name: tensors[names[name]],
        {name: like[old] for name, old in names.items()},
    )


def replace_tensors(tensors: Lazy, made: Mapping[str, tuple[Tensor, Callable[[], Tensor]]]) -> Lazy:
    """Tensors with others beside them or in their places.

    Args:
        made: by name what each is like, and what makes it.
    """
    like = {**(tensors.like or {}), **{name: meta for name, (meta, _) in made.items()}}
    shapes = {name: tuple(meta.shape) for name, meta in like.items()}
    return Lazy(shapes, lambda n: made[n][1]() if n in made else tensors[n], like)


def assemble(
    before: Operated,
    config: Any,
    table: Mapping[str, Source],
    vocabulary: Vocabulary | None = None,
    seed: int = 0,
) -> Operated:
    """The network of ``config``, whose tensors come from those before; what is left begins fresh.

    Args:
        table: of each tensor what it is made of; names that the network has not are left out.
        vocabulary: default that of before.
        seed: of what begins fresh.
    """
    vocabulary = before.vocabulary if vocabulary is None else vocabulary
    own = empty_network(config, vocabulary).state_dict(keep_vars=True)
    given, fresh = on_meta(before.tensors), FreshWeights(config, vocabulary, seed)
    ties: dict[int, Tensor] = {}
    first: dict[int, str] = {}
    like: dict[str, Tensor] = {}
    for name, t in own.items():
        source = table.get(name)
        as_is = given[source] if isinstance(source, str) else t.detach()
        like[name] = ties.setdefault(id(t), as_is)
        first.setdefault(id(t), name)

    @torch.no_grad()
    def read(name: str) -> Tensor:
        source = table.get(name)
        if source is None:
            return fresh[first[id(own[name])]]
        return before.tensors[source] if isinstance(source, str) else source().detach()

    return Operated(
        config, Lazy({n: tuple(t.shape) for n, t in like.items()}, read, like), vocabulary
    )


def on_meta(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Shapes and dtypes of tensors; one under several names is one object."""
    if isinstance(tensors, Lazy) and tensors.like is not None:
        return tensors.like
    seen: dict[int, Tensor] = {}
    return {n: seen.setdefault(id(t), t.detach().to("meta")) for n, t in tensors.items()}


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


def move_layers(names: Mapping[str, Any], to: Mapping[int, list[int]]) -> dict[str, str]:
    """Names with layer i as each of the layers ``to[i]`` -> the name before.

    Those of other layers are left out.
    """
    out = {}
    for name in names:
        if not name.startswith(LAYERS):
            out[name] = name
            continue
        number, _, rest = name.removeprefix(LAYERS).partition(".")
        out |= {f"{LAYERS}{j}.{rest}": name for j in to.get(int(number), [])}
    return out
