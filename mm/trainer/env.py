"""What the trainer lends an objective: its networks as callables, and the Env."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.batch import Batch
from mm.data.streams.shuffle import fold_seed
from mm.model.layer import ModelOut
from mm.run import Run
from mm.trainer.engine.deepspeed import Engine, resolve_precision
from mm.trainer.log.metrics import MetricSum
from mm.trainer.sequence import SequenceGroup
from mm.trainer.stateful import CarriedStates
from mm.trainer.transfer import Sender


class Nets(Mapping[str, Callable[..., ModelOut]]):
    """Networks by name.

    A trainable one runs through its engine and its grad-mode forwards leave their aux behind.
    """

    def __init__(
        self, engines: Mapping[str, Engine], frozen: Mapping[str, nn.Module], env: TrainerEnv
    ):
        self.engines, self.frozen, self.env = engines, frozen, env
        self.carried: CarriedStates | None = None
        self.sums: dict[str, MetricSum] = {}

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
            carried = self.carried if name == "model" else None
            if carried is not None:
                kw.setdefault("state", carried.before(self.env.number(batch)))
            if name in self.frozen:
                with self.env.autocast():
                    return run(batch, **kw)
            out = run(batch, **kw)
            if torch.is_grad_enabled():
                self.sums.setdefault(name, MetricSum()).add_aux(out.aux)
            if carried is not None:
                carried.after(self.env.number(batch), out)
            return out

        return call

    def take(self, name: str) -> MetricSum:
        """The sums of a network since it was last taken."""
        return self.sums.pop(name, None) or MetricSum()


class TrainerEnv:
    """Env of objective.py.

    Everything random is a pure function of (seed, step, rank): a resume needs no saved state.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device,
        precision: str,
        sequence: SequenceGroup | None = None,
    ):
        self.device, self.sequence = device, sequence
        self.step = 0
        self.rng = torch.Generator(device=device)
        self.scheduled: Mapping[str, float] = {}
        self.seed = seed
        self.precision = precision
        self.before_update: Callable[[], None] = lambda: None  # what an update waits for
        self._micros: dict[int, int] = {}
        self._engines: Mapping[str, Engine] = {}
        self._frozen: Mapping[str, nn.Module] = {}
        rank = dist.get_rank() if dist.is_initialized() else 0
        # Processes that share rows draw alike.
        self._rank = rank if sequence is None else rank // sequence.size

    @staticmethod
    def of(run: Run, device: torch.device, before_update: Callable[[], None]) -> TrainerEnv:
        """That of a run. Call on all ranks."""
        precision = resolve_precision(run.engine.precision, device)
        group = SequenceGroup.join(run.engine.sequence)
        env = TrainerEnv(run.seed, device, precision, group)
        env.before_update = before_update
        return env

    def lend(self, engines: Mapping[str, Engine], frozen: Mapping[str, nn.Module]) -> None:
        """Set the networks of this stage."""
        self._engines, self._frozen = engines, frozen

    def begin(self, step: int, scheduled: Mapping[str, float]) -> None:
        """Start a step: reseed this rank's generators."""
        self.step, self.scheduled = step, scheduled
        seed = fold_seed(self.seed, step, self._rank)
        self.rng.manual_seed(seed)
        # Not torch.manual_seed: in a CUDA build without a GPU it queues a call with its traceback,
        # every time.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its rows, where several share them."""
        return self.sequence is None or self.sequence.rank == 0

    def take(self, batch: Batch) -> Batch:
        """What this rank has of a micro-batch on the host, on its device."""
        return batch.sent.pop().arrive() if batch.sent else self._own(batch).to(self.device)

    def send_ahead(self, sender: Sender, batch: Batch) -> None:
        """Begin to copy what `take` will be asked for; from the thread that makes batches."""
        batch.sent.append(sender.send(self._own(batch)))

    def _own(self, batch: Batch) -> Batch:
        return self.sequence.split(batch) if self.sequence else batch

    def know(self, micros: Sequence[Batch]) -> None:
        """Number the micro-batches of the step, so that two passes over one draw the same noise."""
        self._micros = {id(b): i for i, b in enumerate(micros)}

    def seed_of(self, batch: Batch) -> int:
        """Seed of the Ctx of a micro-batch.

        A batch derived from one (`dataclasses.replace`) has number -1.
        """
        return fold_seed(self.seed, self.step, self._rank, self.number(batch))

    def number(self, batch: Batch) -> int:
        """Number of a micro-batch in its step; -1: of a batch derived from one."""
        return self._micros.get(id(batch), -1)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The run's autocast, for a raw module; engines enter it themselves."""
        on = self.precision == "autocast_bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if on else contextlib.nullcontext()

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[nn.Module]:
        """The RAW module of another network, with requires_grad off.

        Through its engine ZeRO-0 refuses the backward.
        """
        module = self._engines[name].raw if name in self._engines else self._frozen[name]
        was = [p for p in module.parameters() if p.requires_grad]
        for p in was:
            p.requires_grad_(False)
        if self.precision == "autocast_bf16":
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
