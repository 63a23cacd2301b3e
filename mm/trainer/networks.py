"""What the trainer lends an objective: its networks as callables, and the Env."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.batch import Batch
from mm.config import Config
from mm.errors import UserError
from mm.model.layer import Block, ModelOut, init_weights
from mm.objectives.objective import Network, Objective
from mm.run import Run
from mm.trainer.checkpoint import Saved
from mm.trainer.engine import Engine
from mm.trainer.lanes import Lanes
from mm.trainer.metrics import Tally


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


class Averages:
    """The networks of mode "ema": whole on every rank, without gradients, after each applied step
    of what they follow ``average = decay average + (1 - decay) weights``; buffers are copied.

    Args:
        networks: all of the stage.
        engines: those that train.
        frozen: raw modules, the averages among them.
        saved: the checkpoint, if any; an average that is not in it begins as what it follows.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        engines: Mapping[str, Engine],
        frozen: Mapping[str, nn.Module],
        saved: Saved | None,
    ):
        self._networks = {k: n for k, n in networks.items() if n.mode == "ema"}
        self._engines, self._frozen = engines, frozen
        for name, network in self._networks.items():
            if saved is None or not saved.has(name):
                self._move(name, str(network.of), 0.0)

    def follow(self, source: str) -> None:
        """Move the averages of ``source``. Call on all ranks."""
        for name, network in self._networks.items():
            if network.of == source:
                self._move(name, source, network.decay)

    @torch.no_grad()
    def _move(self, name: str, source: str, decay: float) -> None:
        mine = self._frozen[name]
        learned = {n for n, _ in mine.named_parameters()}
        with self._engines[source].whole() as module:
            theirs = module.state_dict()
            for key, value in mine.state_dict().items():
                if key in learned:
                    value.lerp_(theirs[key].to(value), 1 - decay)
                else:
                    value.copy_(theirs[key])

    def saved(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """What a checkpoint keeps of them: weights and buffers on the CPU, no optimizer states."""
        out = {}
        for name in self._networks:
            state = self._frozen[name].state_dict()
            out[name] = ({k: v.to("cpu", copy=True) for k, v in state.items()}, {})
        return out


class Nets(Mapping[str, Callable[..., ModelOut]]):
    """Networks by name.

    A trainable one runs through its engine and its grad-mode forwards leave their aux behind.
    """

    def __init__(
        self, engines: Mapping[str, Engine], frozen: Mapping[str, nn.Module], env: TrainerEnv
    ):
        self.engines, self.frozen, self.env = engines, frozen, env
        self.lanes: Lanes | None = None
        self.tallies: dict[str, Tally] = {}

    def __iter__(self) -> Iterator[str]:
        return iter([*self.engines, *self.frozen])

    def __len__(self) -> int:
        return len(self.engines) + len(self.frozen)

    def __getitem__(self, name: str) -> Callable[..., ModelOut]:
        run = self.engines.get(name) or self.frozen.get(name)
        if run is None:
            raise KeyError(f"the objective declared no network '{name}', only {', '.join(self)}")

        def call(batch: Batch, **kw: Any) -> ModelOut:
            kw.setdefault("scheduled", self.env.scheduled)
            kw.setdefault("seed", self.env.seed_of(batch))
            lanes = self.lanes if name == "model" else None
            if lanes is not None:
                kw.setdefault("state", lanes.before(self.env.number(batch)))
            if name in self.frozen:
                with self.env.autocast():
                    return run(batch, **kw)
            out = run(batch, **kw)
            if torch.is_grad_enabled():
                self.tallies.setdefault(name, Tally()).add_aux(out.aux)
                if lanes is not None:
                    lanes.after(self.env.number(batch), out)
            return out

        return call

    def take(self, name: str) -> Tally:
        """The tally of a network since it was last taken."""
        return self.tallies.pop(name, None) or Tally()


class TrainerEnv:
    """Env of objective.py.

    Everything random is a pure function of (seed, step, rank): a resume needs no saved state.
    """

    def __init__(self, seed: int, device: torch.device, precision: str):
        self.device = device
        self.step = 0
        self.rng = torch.Generator(device=device)
        self.scheduled: Mapping[str, float] = {}
        self._seed = seed
        self._precision = precision
        self._micros: dict[int, int] = {}
        self._engines: Mapping[str, Engine] = {}
        self._frozen: Mapping[str, nn.Module] = {}
        self._rank = dist.get_rank() if dist.is_initialized() else 0

    def lend(self, engines: Mapping[str, Engine], frozen: Mapping[str, nn.Module]) -> None:
        """Set the networks of this stage."""
        self._engines, self._frozen = engines, frozen

    def begin(self, step: int, scheduled: Mapping[str, float]) -> None:
        """Start a step: reseed this rank's generators."""
        self.step, self.scheduled = step, scheduled
        seed = mix(self._seed, step, self._rank)
        self.rng.manual_seed(seed)
        # Not torch.manual_seed: in a CUDA build without a GPU it queues a call with its traceback,
        # every time.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def know(self, micros: Sequence[Batch]) -> None:
        """Number the micro-batches of the step, so that two passes over one draw the same noise."""
        self._micros = {id(b): i for i, b in enumerate(micros)}

    def seed_of(self, batch: Batch) -> int:
        """Seed of Ctx for a micro-batch; a batch derived from one (`dataclasses.replace`) shares
        number -1.
        """
        return mix(self._seed, self.step, self._rank, self.number(batch))

    def number(self, batch: Batch) -> int:
        """Number of a micro-batch in its step; -1: of a batch derived from one."""
        return self._micros.get(id(batch), -1)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The run's autocast, for a raw module; engines enter it themselves."""
        on = self._precision == "autocast_bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if on else contextlib.nullcontext()

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[nn.Module]:
        """The RAW module of another network with requires_grad off: through its engine ZeRO-0
        refuses the backward.
        """
        module = self._engines[name].raw if name in self._engines else self._frozen[name]
        was = [p for p in module.parameters() if p.requires_grad]
        for p in was:
            p.requires_grad_(False)
        if self._precision == "autocast_bf16":
            # around its forward alone: a with-block here would span the objective's yields, so the
            # trainer's backwards
            module.forward = torch.autocast(self.device.type, torch.bfloat16)(module.forward)
        try:
            yield module
        finally:
            module.__dict__.pop("forward", None)
            for p in was:
                p.requires_grad_(True)

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' tensors along dim 0, with gradient."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return x
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x))


def mix(*parts: int) -> int:
    """Hash integers to a 62-bit seed (splitmix64 finaliser over a running sum)."""
    state = 0
    for part in parts:
        state = (state + 0x9E3779B97F4A7C15 + (part & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 2
