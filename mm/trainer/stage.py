"""Networks of a stage: which ones, built, filled, compiled; what it begins from and leaves."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.launch import environment
from mm.model.by_module import build_empty
from mm.model.layer import Block, init_weights
from mm.model.noise import STEP_SEED
from mm.model.size import require_room
from mm.model.slices import Lazy
from mm.objectives.objective import Network, Objective
from mm.run import Run, Stage
from mm.trainer.begin_weights import fill_cut, fill_whole, require_fit
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.ema import Averages
from mm.trainer.engine.cutter import Cutter
from mm.trainer.engine.deepspeed import Engine, gather_in_passes
from mm.trainer.env import Nets, TrainerEnv
from mm.trainer.log.clock import StepClock
from mm.trainer.sequence import data_ranks, require_shares
from mm.trainer.stage_model import run_of
from mm.trainer.stateful import CarriedStates
from mm.trainer.trainable import hold_other_rows, n_trained, set_trainable
from mm.trainer.transfer import Sender
from mm.trainer.warm_start import WarmStart, config_at_start
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
    trained: dict[str, int] = field(default_factory=dict)  # of `parameters`, those that train
    begun: dict[str, dict[str, Any]] = field(default_factory=dict)  # network -> its `init_from`

    @property
    def from_folders(self) -> dict[str, dict[str, Any]]:
        """Folder and hash of frozen networks that come from one: no checkpoint holds them."""
        known = ("folder", "step", "sha256")
        begun = {name: told for name, told in self.begun.items() if name in self.frozen}
        return {name: {k: told[k] for k in known} for name, told in begun.items()}

    def settle(self) -> None:
        """Take what a stage is made of out of the garbage collector's sight.

        It looks at every object of the process again and again: half a million of the imports and
        the networks, a tenth of a second each time, on each rank in another step.
        """
        if self.index:  # cycles may hold the stage before
            gc.collect()
        gc.freeze()

    def close(self) -> None:
        """Stop the data; what is left of the stage in cycles is garbage again."""
        self.stream.close()
        gc.unfreeze()

    def begin_step(self, step: int) -> dict[str, float]:
        """Seed everything random of ``step``; returns the objective's scheduled values."""
        rng = np.random.default_rng((self.env.seed, step))
        scheduled = self.objective.scheduled(step, rng)
        # After the objective's draws, which stay what they were.
        self.env.begin(step, {**scheduled, STEP_SEED: float(rng.integers(2**31))})
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
    run = run_of(run, index)
    config = run.stages[index]
    objective: Objective = build(config.objective, vocabulary=vocabulary)
    inside = snapshot if snapshot is not None and snapshot.state["stage"] == index else None
    engines: dict[str, Engine] = {}
    frozen: dict[str, nn.Module] = {}
    parameters: dict[str, int] = {}
    begun: dict[str, dict[str, Any]] = {}
    trained: dict[str, int] = {}
    wanted = all_networks(run, objective, f"stages.{index}.objective")
    for name, network in wanted.items():
        cut = run.engine.effective_zero_stage == 3
        copies = 2 if network.mode == "train" else 1  # its gradients, too
        make = lambda config=network.config: build(config, vocabulary=vocabulary)
        share = copies / environment.ranks().world if cut else copies
        require_room(make, share, env.device, f"{run.name}: network '{name}'")
        if cut:
            module = build_empty(make, env.device)
        else:
            module = make_module(network.config, vocabulary, run.seed, env.device)
        require_shares(run, index, objective, module, name)
        source = weights_of(run, index, snapshot, name, network, vocabulary)
        have = weights_at_start(run, index, source, name) if source is not None else {}
        new = source.new_modalities if source is not None and have else run.tokenizers
        vectors = {}
        if name == "model" and run.tokenizers and new and hasattr(network.config, "prepare"):
            vectors = {m: v for m, v in code_vectors().items() if v is not None and m in new}
        prepare = partial(network.config.prepare, module, vectors) if vectors else None
        fitted: Mapping[str, Any] = {}
        if source is not None and have:
            fitted = source.fit(module, have)
            begins = source.told.get("new", ()) if isinstance(source, WarmStart) else ()
            require_fit(module, fitted, source.origin, source.mend, begins)
        if not cut:
            fill_whole(module, fitted, prepare)
        if isinstance(source, WarmStart):
            begun[name] = source.told
        read = partial(inside.read, name) if inside is not None and inside.has(name) else None
        if network.mode != "train":
            frozen[name] = module.eval().requires_grad_(False)
            if cut:  # in fp32 at every precision, as where it is whole
                cutter = Cutter(run.engine, "fp32", sum(p.numel() for p in module.parameters()))
                fill_cut(module, env.device, run.seed, cutter, fitted, prepare, read)
                gather_in_passes(module, moves=network.mode == "ema")
            continue
        if run.engine.compile:
            compile_blocks(module, run.engine.compile_options(env.device.type))
        set_trainable(module, config, f"stages.{index}", name, vocabulary, fresh=not have)
        parameters[name] = sum(p.numel() for p in module.parameters())
        trained[name] = n_trained(module)
        optimizer = config.optimizer.build(module)
        slices = None
        if cut:
            cutter = Cutter(run.engine, env.precision, parameters[name])
            fill_cut(module, env.device, run.seed, cutter, fitted, prepare, read)
            slices = cutter.frozen
        engine = Engine(module.train(), optimizer, run.engine, env.precision, config.ema, slices)
        hold_other_rows(module)
        if inside is not None:
            engine.load_masters(partial(inside.read, name))
            scalars = inside.state["optimizers"].get(name, {})
            if scalars or inside.optimizer(name):
                engine.load_optimizer_state(partial(inside.read, f"{name}.optimizer"), scalars)
        engines[name] = engine
    averages = Averages(wanted, engines, frozen, snapshot)
    env.lend(engines, frozen)
    nets = Nets(engines, frozen, env)
    stream = make_stream(run, index, objective, vocabulary)
    if env.device.type == "cuda":
        stream.made = partial(env.send_ahead, Sender(env.device))
    nets.carried = CarriedStates.of(stream, engines["model"], env.autocast())
    if inside is not None:
        stream.load_state_dict(inside.state["data"])
        if nets.carried is not None:
            nets.carried.load(inside)
    objective.check_model(engines["model"].raw)
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
        4 * sum(parameters.values()) + 8 * sum(trained.values()),  # fp32, two states
        parameters,
        StepClock(env.device),
        trained,
        begun,
    )


def make_stream(run: Run, index: int, objective: Objective, vocabulary: Vocabulary | None) -> Any:
    """The data of a stage as this rank reads them. Raises UserError."""
    ranks = data_ranks(run.engine.sequence)
    stream = build(
        run.stages[index].data,
        vocabulary=vocabulary,
        transform=objective.transform,
        seed=run.seed,
        rank=ranks.rank,
        world=ranks.world,
    )
    several = getattr(getattr(stream, "declared", None), "codebooks", ())
    if several and not objective.reads_codebooks:
        raise UserError(
            f"stages.{index}.objective: it learns one id a place, and the transform delay gives "
            f"'{several[0]}' several: use next_token, or leave the transform out"
        )
    heads = getattr(run.model, "heads", None)
    if heads is not None and hasattr(stream, "require_heads"):
        try:
            stream.require_heads(heads)
        except UserError as error:
            raise UserError(f"stages.{index}: {error}") from error
    return stream


def build(config: Config, **offered: Any) -> Any:
    """Call ``config.build`` with those of ``offered`` that it names."""
    known = inspect.signature(config.build).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return config.build(**{k: v for k, v in offered.items() if takes_all or k in known})


def all_networks(run: Run, objective: Objective, key: str = "objective") -> dict[str, Network]:
    """The model and the objective's own networks.

    One without a config takes that of the folder it begins from, else of the network that it
    follows. Raises UserError when that is not a trained network.
    """
    networks = {"model": Network(run.model), **objective.networks}
    for name, network in networks.items():
        if network.config is None and network.init_from is not None:
            networks[name] = network._replace(
                config=config_at_start(f"{key}.{name}", network.init_from)
            )
        elif network.mode == "ema" or (network.mode == "frozen" and network.of):
            of = networks.get(network.of or "")
            if of is None or of.mode != "train":
                raise UserError(
                    f"objective: network '{name}' follows '{network.of}', which is not trained"
                )
            networks[name] = network._replace(config=network.config or of.config)
    return networks


def weights_of(
    run: Run,
    index: int,
    snapshot: Snapshot | None,
    name: str,
    network: Network,
    vocabulary: Vocabulary | None,
) -> Snapshot | None:
    """What a network begins with: the snapshot, else the folder that it names; None: it is fresh.

    Raises UserError where a folder is another than it was when the stage began.
    """
    if snapshot is not None and snapshot.has(name):
        return snapshot
    if network.init_from is None:
        return None
    key = f"stages.{index}.objective.{name}"
    warm = WarmStart(
        key,
        network.init_from,
        vocabulary,
        name=name,
        exact=network.mode == "frozen",
        words=run.vocabulary,
    )
    inside = snapshot is not None and snapshot.state["stage"] == index
    was = snapshot.state.get("given", {}).get(name) if snapshot is not None and inside else None
    if was is not None and was["sha256"] != warm.facts["sha256"]:
        raise UserError(
            f"{key}: the weights in {warm.origin} are not those that this run began with; put "
            "them back, or begin a new run: name=..."
        )
    return warm


def make_module(config: Config, vocabulary: Any, seed: int, device: torch.device) -> nn.Module:
    """Build and fill a network; the same weights on every rank."""
    torch.manual_seed(seed)
    with torch.device(device):
        module = build(config, vocabulary=vocabulary)
        init_weights(module, seed)
    return module


def compile_blocks(module: nn.Module, options: Mapping[str, bool] | None = None) -> None:
    """Let torch.compile make code of every block of a network, in place.

    Names and parameters stay. A network without blocks is compiled as one.

    Blocks of one config share their code. On an accelerator packed rows keep one shape; elsewhere,
    and in a layer that takes documents apart, a block whose documents have a new shape is compiled
    once more, then for all shapes.

    Args:
        options: of Inductor. With "triton.cudagraphs" a block's kernels are captured and launched
            as one; whoever trains calls `torch.compiler.cudagraph_mark_step_begin` before every
            optimizer step: until the next call gradients of several micro-batches keep their
            memory.
    """
    import torch._dynamo.config as dynamo

    parts = [m for m in module.modules() if isinstance(m, Block)] or [module]
    # each kind of block twice or more, all under the one `forward` of their class
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(parts))
    for part in parts:
        part.compile(options=dict(options) if options else None)


def stage_result(stage: Stage, snapshot: Snapshot, network: str) -> Lazy:
    """What a stage leaves of a network to the next one, or to the saved model.

    The only place that says it: the weights, with the EMA or the optimizer's own average in their
    place where there is one. Each is read when it is asked for.

    Args:
        stage: the stage that the snapshot was taken in.
    """
    weights, states = snapshot.tensors(network), snapshot.optimizer(network)
    by_parameter: dict[str, dict[str, str]] = {}
    for key in states:
        state, _, parameter = key.partition("/")
        by_parameter.setdefault(parameter, {})[state] = key

    def result(name: str) -> Tensor:
        keys = by_parameter.get(name, {})
        if stage.ema is not None and stage.ema.export:
            return states[keys["ema"]] if "ema" in keys else weights[name]
        of_name = Lazy(
            {k: states.shapes[key] for k, key in keys.items()}, lambda k: states[keys[k]]
        )
        average = stage.optimizer.average(weights[name], of_name) if keys else None
        return weights[name] if average is None else average

    return Lazy(weights.shapes, result)


def weights_at_start(run: Run, index: int, snapshot: Snapshot, network: str) -> Lazy:
    """What stage ``index`` begins a network with; empty when the snapshot has none of that name.

    Inside the stage the weights as they are, else the result of the stage of the snapshot.
    """
    taken_in = snapshot.state["stage"]
    if taken_in == index:
        return snapshot.tensors(network)
    return stage_result(run.stages[min(taken_in, len(run.stages) - 1)], snapshot, network)


def end_of_stage(stage: Stage, snapshot: Snapshot, networks: Iterable[str]) -> Snapshot:
    """The part of a stage's last snapshot that the next one needs: without optimizer states."""
    kept = [n for n in networks if snapshot.has(n)]
    return Snapshot(snapshot.state, {n: stage_result(stage, snapshot, n) for n in kept})
