"""Networks of a stage: which ones, built, filled, compiled; what it begins from and leaves."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.model.layer import Block, init_weights
from mm.model.size import require_room
from mm.objectives.objective import Network, Objective
from mm.run import Run, Stage
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.ema import Averages
from mm.trainer.engine.deepspeed import Engine
from mm.trainer.env import Nets, TrainerEnv
from mm.trainer.log.clock import StepClock
from mm.trainer.sequence import data_ranks, require_shares
from mm.trainer.stateful import CarriedStates
from mm.vocabulary import Vocabulary


@dataclass
class StageState:
    """One stage as it trains: its networks with their engines, and its data."""

    index: int
    begin: int  # optimizer steps of the run before it
    config: Stage
    objective: Objective
    engines: dict[str, Engine]
    frozen: dict[str, nn.Module]  # networks of modes "frozen" and "ema"
    averages: Averages
    env: TrainerEnv
    nets: Nets
    stream: Any
    compiled: bool
    save_bytes: int  # of a checkpoint, about
    parameters: dict[str, int]  # of each network that trains
    clock: StepClock

    def begin_step(self, step: int) -> dict[str, float]:
        """Seed everything random of ``step``; returns the objective's scheduled values."""
        rng = np.random.default_rng((self.env.seed, step))
        scheduled = self.objective.scheduled(step, rng)
        self.env.begin(step, scheduled)
        return scheduled

    @contextlib.contextmanager
    def unsharded(self, name: str) -> Iterator[nn.Module]:
        """A network in eval mode with all weights present; enter and leave it on ALL ranks."""
        with self.engines[name].unsharded() as module:
            was = [m for m in module.modules() if m.training]
            module.eval()
            try:
                yield module
            finally:
                for m in was:
                    m.training = True

    def lr_factor(self, step: int) -> float:
        """Multiplier of the learning rates at ``step`` of the run."""
        return self.config.schedule(step - self.begin, self.config.budget.steps)


def enter_stage(
    run: Run,
    index: int,
    begin: int,
    env: TrainerEnv,
    snapshot: Snapshot | None,
    vocabulary: Vocabulary | None,
    code_vectors: Callable[[], Mapping[str, Any]],
) -> StageState:
    """Build a stage: objective, networks as in ``snapshot`` or fresh, engines, data.

    Args:
        begin: steps of the run before it.
        code_vectors: vectors of the tokenizers' codes by modality, for a fresh model.
    """
    config = run.stages[index]
    objective: Objective = build(config.objective, vocabulary=vocabulary)
    inside = snapshot if snapshot is not None and snapshot.state["stage"] == index else None
    engines: dict[str, Engine] = {}
    frozen: dict[str, nn.Module] = {}
    parameters: dict[str, int] = {}
    wanted = all_networks(run, objective)
    for name, network in wanted.items():
        copies = 2 if network.mode == "train" else 1  # its gradients, too
        make = lambda config=network.config: build(config, vocabulary=vocabulary)
        require_room(make, copies, env.device, f"{run.name}: network '{name}'")
        module = make_module(network.config, vocabulary, run.seed, env.device)
        require_shares(run, index, objective, module, name)
        have = weights_at_start(run, index, snapshot, name) if snapshot is not None else {}
        new = snapshot.new_modalities if snapshot is not None and have else run.tokenizers
        if name == "model" and run.tokenizers and new and hasattr(network.config, "prepare"):
            vectors = {m: v for m, v in code_vectors().items() if v is not None and m in new}
            network.config.prepare(module, vectors)
        if snapshot is not None and have:
            load_weights(module, snapshot.fit(module, have), snapshot.origin, snapshot.mend)
        if network.mode != "train":
            frozen[name] = module.eval().requires_grad_(False)
            continue
        if run.engine.compile:
            compile_blocks(module)
        parameters[name] = sum(p.numel() for p in module.parameters())
        optimizer = config.optimizer.build(module)
        engine = Engine(module.train(), optimizer, run.engine, env.precision, config.ema)
        if inside is not None:
            engine.load_masters(have)
            engine.load_optimizer_state(
                inside.optimizer(name), inside.state["optimizers"].get(name, {})
            )
        engines[name] = engine
    averages = Averages(wanted, engines, frozen, snapshot)
    env.lend(engines, frozen)
    nets = Nets(engines, frozen, env)
    stream = make_stream(run, index, objective, vocabulary)
    nets.carried = CarriedStates.of(stream, engines["model"], env.autocast())
    if inside is not None:
        stream.load_state_dict(inside.state["data"])
        if nets.carried is not None:
            nets.carried.load(inside)
    return StageState(
        index,
        begin,
        config,
        objective,
        engines,
        frozen,
        averages,
        env,
        nets,
        stream,
        run.engine.compile,
        12 * sum(parameters.values()),  # fp32, two states
        parameters,
        StepClock(env.device),
    )


def make_stream(run: Run, index: int, objective: Objective, vocabulary: Vocabulary | None) -> Any:
    """The data of a stage as this rank reads them. Raises UserError."""
    ranks = data_ranks(run.engine.sequence)
    return build(
        run.stages[index].data,
        vocabulary=vocabulary,
        transform=objective.transform,
        seed=run.seed,
        rank=ranks.rank,
        world=ranks.world,
    )


def build(config: Config, **offered: Any) -> Any:
    """Call ``config.build`` with those of ``offered`` that it names."""
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
    """Let torch.compile make code of every block of a network, in place.

    Names and parameters stay. A network without blocks is compiled as one.

    Blocks of one config share their code. A block whose documents have a new shape is compiled
    once more, then for all shapes.
    """
    import torch._dynamo.config as dynamo

    parts = [m for m in module.modules() if isinstance(m, Block)] or [module]
    # each kind of block twice or more, all under the one `forward` of their class
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(parts))
    for part in parts:
        part.compile()


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], origin: str, mend: str = Snapshot.mend
) -> None:
    """Copy full tensors into parameters and buffers.

    Raises UserError with ``mend`` when a name or shape does not fit.
    """
    own = module.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            have = tuple(own[name].shape) if name in own else "absent"
            raise UserError(
                f"{origin}: '{name}' is {tuple(tensor.shape)} there and {have} in the model; {mend}"
            )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    unset = {n for n, _ in module.named_parameters()} - set(weights)
    if unset:
        raise UserError(f"{origin}: has no '{min(unset)}'; {mend}")


def stage_result(stage: Stage, snapshot: Snapshot, network: str) -> dict[str, Tensor]:
    """What a stage leaves of a network to the next one, or to the saved model.

    The only place that says it, for a snapshot in memory and for one in a folder: the weights, with
    the EMA or the optimizer's own average in their place where there is one.

    Args:
        stage: the stage that the snapshot was taken in.
    """
    out, states = snapshot.tensors(network), snapshot.optimizer(network)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in states.items():
        state, _, parameter = key.partition("/")
        by_parameter.setdefault(parameter, {})[state] = value
    for parameter, found in by_parameter.items():
        if stage.ema is not None and stage.ema.export:
            average = found.get("ema")
        else:
            average = stage.optimizer.average(out[parameter], found)
        if average is not None:
            out[parameter] = average
    return out


def weights_at_start(run: Run, index: int, snapshot: Snapshot, network: str) -> dict[str, Tensor]:
    """What stage ``index`` begins a network with; {} when the snapshot has none of that name.

    Inside the stage the weights as they are, else the result of the stage of the snapshot.
    """
    taken_in = snapshot.state["stage"]
    if taken_in == index:
        return snapshot.tensors(network)
    return stage_result(run.stages[min(taken_in, len(run.stages) - 1)], snapshot, network)


def end_of_stage(stage: Stage, snapshot: Snapshot, networks: Iterable[str]) -> Snapshot:
    """The part of a stage's last snapshot that the next one needs: without optimizer states."""
    return Snapshot(snapshot.state, {n: stage_result(stage, snapshot, n) for n in networks})
