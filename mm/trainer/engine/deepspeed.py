"""The ONE module that imports deepspeed: one engine per trainable network.

What was found out about DeepSpeed 0.19.8 and is relied on here:

- fp32 + AdamW gives equal losses at stages 0-3. Under autocast, stages 1-3 are equal as long as
  gradients travel in fp32 (``lower_precision_safe_modules`` names a module without parameters).
- With `managed_gradient_accumulation: false` the caller's `step` is the accumulation boundary.
- Stage 0 applies non-finite gradients, stages 1-3 skip the step: stage 0 is clipped and checked
  here.
- Stages 2 and 3 take gradients to be ready in one order in all processes (`GradientOrder`); stages
  0 and 1 reduce them in the order of the parameters.
- Its shared-memory all-reduce is compiled at the first start (39 s here, and a stale lock hangs
  it): switched off.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.engine_config import EngineConfig
from mm.errors import UserError
from mm.launch import environment
from mm.schedule import Ema
from mm.trainer.engine.gradient_order import GradientOrder
from mm.trainer.engine.on_disk import states_in_memory
from mm.trainer.engine.optimizer_state import load_states, make_states
from mm.trainer.engine.reducer import Reducer
from mm.trainer.engine.settings import (
    Where,
    boundary_is_told,
    bucket_size,
    deepspeed_json,
    overlaps,
)
from mm.trainer.engine.zero_shards import Shards, join_slices
from mm.trainer.optimizers.base import ShardOptimizer

log = logging.getLogger("mm.trainer")

Read = Callable[[str, int, int], Tensor]
WIRE = {"fp32": "float32", "bf16": "bfloat16"}  # torch's name of a dtype of gradients


def resolve_precision(asked: str, device: torch.device) -> str:
    """Replace "auto" by autocast_bf16 where the hardware multiplies bf16 matrices, else by fp32."""
    if asked != "auto":
        return asked
    if device.type == "cuda":  # cards before compute capability 8.0 only emulate it
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = environment.cpu_has_bf16()
    return "autocast_bf16" if fast else "fp32"


def here() -> Where:
    """What this process trains on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Where(device, dist.get_world_size() if dist.is_initialized() else 1)


def settings_here(config: EngineConfig, precision: str, n_params: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a network that trains here. Raises UserError for what cannot."""
    offload = config.offload
    if "nvme" in offload.places:
        _deepspeed()
        from deepspeed.ops import op_builder

        builders: Any = op_builder
        if not builders.AsyncIOBuilder().is_compatible(False):
            raise UserError(
                "engine.offload: nvme needs libaio with its headers: apt-get install libaio-dev; "
                "or say cpu"
            )
        assert offload.folder is not None
        offload.folder.mkdir(parents=True, exist_ok=True)
    return deepspeed_json(config, precision, n_params, here())


def near_group() -> Any:
    """The group within which hierarchical partitioning gathers, one for all networks; or None."""
    from deepspeed.utils import groups

    return groups._get_zero_param_intra_parallel_group()


def _deepspeed() -> Any:
    """Import DeepSpeed, quietly, with its accelerator chosen and its C++ builds off."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    environment.prepare()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(
        logging.ERROR
    )  # it warns of every skipped step; the trainer does too
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def communicating() -> Iterator[Any]:
    """DeepSpeed, quietly, on the process group that there is."""
    deepspeed = _deepspeed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not deepspeed.comm.is_initialized():
            backend = dist.get_backend()
            deepspeed.init_distributed(backend, auto_mpi_discovery=False)
        yield deepspeed


class Engine:
    """One trainable network: forward, backward, step and full fp32 tensors at any ZeRO stage.

    Args:
        frozen: of `Cutter`, which has cut all parameters for ZeRO stage 3; None: they are whole.
    """

    _order: GradientOrder | None = None  # until the first step
    _reducer: Reducer | None = None  # at ZeRO stage 0
    _told = False  # DeepSpeed is told which backward is the last of a step

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        precision: str,
        ema: Ema | None = None,
        frozen: Mapping[str, Tensor] | None = None,
    ):
        self.raw = module
        self.zero_stage = config.effective_zero_stage
        self.grad_clip = config.grad_clip
        # ZeRO replaces the groups' parameters by flat shards: remember which group each parameter
        # is in
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if not any(p.requires_grad for p in module.parameters()):
            raise UserError(f"network {type(module).__name__} has no trainable parameter")
        if config.offload.optimizer == "nvme" and (ema or isinstance(optimizer, ShardOptimizer)):
            what = "stages.N.ema" if ema else f"the optimizer {type(optimizer).__name__}"
            raise UserError(
                f"engine.offload.optimizer: nvme: {what} reads what is on the disk then; say cpu, "
                "or take an optimizer of torch (adamw)" + (" without ema" if ema else "")
            )
        n_params = sum(getattr(p, "ds_numel", p.numel()) for _, p in self.trainable())
        # DeepSpeed rounds all weights to bf16 and keeps masters only of those that train.
        self.frozen = frozen or {
            name: p.detach().to("cpu", copy=True)
            for name, p in module.named_parameters()
            if precision == "bf16" and not p.requires_grad
        }
        wire = getattr(torch, WIRE.get(config.communication.dtype, ""), None)
        if precision == "autocast_bf16":
            for _, p in self.trainable():
                p.comm_dtype = wire or p.dtype  # type: ignore[attr-defined]
        self._told = boundary_is_told(config, here())
        with communicating() as deepspeed:
            self.ds, self.optimizer, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=settings_here(config, precision, n_params),
                dist_init_required=False,
            )
        # torch 2.14 deprecates two collectives that DeepSpeed calls in every stage 3 step
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module="torch.distributed.c10d_logger"
        )
        self.shards = self._shards()
        self.shards.wire = self.ds.device
        if isinstance(self.base, ShardOptimizer):
            self.base.shards = self.shards
        self.ema = ema
        self.updates = 0  # applied
        self._averages: dict[Tensor, Tensor] = {}
        self._restart_averages()
        if self.zero_stage == 0:
            # `reduce` below does it, so that the norm is known before the step
            self.ds.enable_backward_allreduce = False
            params = [p for _, p in self.trainable()]
            size, overlap = bucket_size(config, n_params), overlaps(config, here())
            self._reducer = Reducer(params, size, wire, overlap)
        if self.zero_stage > 1 and dist.get_world_size() > 1:
            self._order = GradientOrder(self.trainable())

    def __call__(self, *args: Any, **kw: Any) -> Any:
        return self.ds(*args, **kw)

    def backward(self, loss: Tensor, last: bool = False) -> None:
        """Accumulate gradients of ``loss`` (scaled by the caller); ``last``: of the step."""
        if last and self._reducer is not None:
            self._reducer.arm()
        if self._told:
            self.ds.set_gradient_accumulation_boundary(last)
        self.ds.backward(loss, scale_wrt_gas=False)

    def set_lr(self, multiplier: float) -> float:
        """Set every group's rate to its initial one times ``multiplier``; returns the first."""
        for group in self.base.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        return self.base.param_groups[0]["lr"]

    @property
    def base(self) -> torch.optim.Optimizer:
        """The torch optimizer under DeepSpeed's wrapper."""
        return self.ds.basic_optimizer

    def reduce(self) -> Tensor | None:
        """Average gradients over ranks at ZeRO stage 0: the global norm, () float32; else None."""
        if self._reducer is None:
            return None
        self._reducer.finish()
        grads = [p.grad for p in self.raw.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads).float()

    def step(self, norm: float | None) -> tuple[bool, float]:
        """Clip and update. ``norm``: what `reduce` gave, on the host (stage 0).

        Returns:
            Whether the update was applied, and the gradient norm before clipping (inf when it was
            not).

        Raises UserError as `GradientOrder.check`.
        """
        if self._order is not None:
            self._order.check(self.ds.device)
            self._order = None
        if norm is not None:
            if not norm < float("inf"):  # NaN too
                self.ds.zero_grad()
                return False, float("inf")
            if self.grad_clip and norm > self.grad_clip:
                grads = [p.grad for p in self.raw.parameters() if p.grad is not None]
                for grad in grads:
                    grad.mul_(self.grad_clip / (norm + 1e-6))
        self.ds.step()
        if not self.ds.was_step_applied():
            return False, float("inf")
        self._average(self.updates)
        self.updates += 1
        if norm is None:
            found = self.ds.get_global_grad_norm()
            assert found is not None, "DeepSpeed tells the norm where it has it computed"
            norm = float(found)
        return True, norm

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters once each (tied ones under their first name)."""
        return ((name, p) for name, p in self.raw.named_parameters() if p.requires_grad)

    def weights(self) -> dict[str, Tensor]:
        """Full CPU tensors of parameters (fp32 masters) and persistent buffers, by their names."""
        from deepspeed.utils import safe_get_full_fp32_param

        out = {}
        for name, p in self.raw.named_parameters():
            full = safe_get_full_fp32_param(p) if p.requires_grad else self.frozen.get(name)
            if full is not None and self.zero_stage == 3 and not p.requires_grad:
                full = join_slices(full, p.ds_shape)  # type: ignore[attr-defined]
            if full is None:
                with self._gather([p]):
                    full = p.detach()
            out[name] = full.detach().to("cpu", copy=True)
        kept = self.raw.state_dict().keys()  # without the non-persistent buffers
        out |= {
            name: b.detach().to("cpu", copy=True)
            for name, b in self.raw.named_buffers()
            if name in kept
        }
        return out

    def load_optimizer_state(self, read: Read, scalars: Mapping[str, float]) -> None:
        """Put back the states of a checkpoint, made at any stage and world size.

        Of each only the range that this rank holds is read. Call before the first step.

        Args:
            read: elements ``start : start + n`` of state ``key/parameter name``, on the host.
        Raises:
            UserError: they are another optimizer's.
        """
        make_states(self.base, self.shards, partial(self.in_memory, changed=True))
        self.updates = int(scalars.get("ema_updates", 0))
        if self.ema is not None and "ema_updates" not in scalars:
            log.info("the checkpoint has no EMA: it starts from its weights")
            self._restart_averages()
        for x in self.shards.spans:
            states = self.states(x)
            if "ema_updates" not in scalars:
                states.pop("ema", None)
            with self.in_memory(x, changed=True):
                load_states(self.base, self.shards, x, states, read, scalars)

    def load_masters(self, read: Read) -> None:
        """Set the fp32 masters (they differ from the weights only where these are bf16).

        ``read``: elements ``start : start + n`` of a parameter; only this rank's are read.
        """
        if self.zero_stage:
            for x, spans in self.shards.spans.items():
                with torch.no_grad(), self.in_memory(x, changed=True):
                    for span in spans:
                        part = lambda start, n, name=span.name: read(name, start, n)
                        self.shards.put(x, span, part)

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[nn.Module]:
        """The raw module with all its weights on every rank: ZeRO-3 gathers them for the block."""
        with self._gather(list(self.raw.parameters())):
            yield self.raw

    def _gather(self, params: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        return _deepspeed().zero.GatheredParameters(params)

    def _shards(self) -> Shards:
        """What the optimizer's tensors hold, from DeepSpeed's own lists."""
        names: dict[Tensor, str] = {p: name for name, p in self.trainable()}
        if self.zero_stage == 0:
            return Shards.from_groups(self.base.param_groups, names)
        optimizer: Any = self.optimizer
        if self.zero_stage < 3:
            flats = optimizer.single_partition_of_fp32_groups
            return Shards.of_flats(flats, optimizer.round_robin_bit16_groups, names)
        flats, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
        return Shards.of_slices(flats, groups, names, optimizer.sub_group_to_group_id)

    def in_memory(
        self, x: Tensor, changed: bool = False
    ) -> contextlib.AbstractContextManager[bool]:
        """One of the optimizer's tensors and its states, wherever they lie: `states_in_memory`."""
        return states_in_memory(self.optimizer, x, changed)

    def states(self, x: Tensor) -> dict[str, Any]:
        """All states of one of the optimizer's tensors, the EMA among them."""
        out = dict(self.base.state[x])
        return out | ({"ema": self._averages[x]} if self.ema is not None else {})

    def _restart_averages(self) -> None:
        if self.ema is not None:
            self._averages = {x: x.detach().clone() for x in self.shards.spans}

    @torch.no_grad()
    def _average(self, updates: int) -> None:
        """Move the EMA towards the weights; ``updates``: applied before this one."""
        if self.ema is not None:
            keep = self.ema.keep(updates)
            for x, average in self._averages.items():
                average.lerp_(x, 1 - keep)


def gather_in_passes(module: nn.Module, moves: bool) -> None:
    """Gather each layer of a network that does not train for its pass, and let go of it after.

    As `Engine` does at ZeRO stage 3 for one that trains.

    Args:
        module: whose parameters are all cut (`Cutter`).
        moves: its slices change between passes; else small parameters stay gathered.
    """
    with communicating():
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils.timer import NoopTimer

        keep: dict[str, Any] = {"param_persistence_threshold": 0} if moves else {}
        DeepSpeedZeRoOffload(module, NoopTimer(), None, overlap_comm=False, **keep)

    def passing(inside: bool) -> None:
        """Within a pass a parameter that another module reads (a tied one) is gathered, too."""
        for each in module.modules():
            each._parameters._in_forward = inside  # type: ignore[attr-defined]

    module.register_forward_pre_hook(lambda *_: passing(True))
    module.register_forward_hook(lambda *_: passing(False), always_call=True)


def linear_of_stage(zero_stage: int) -> Callable[..., Tensor]:
    """What `torch.nn.functional.linear` is at a ZeRO stage: stage 3 keeps no cast of the weight."""
    if zero_stage < 3:
        return torch.nn.functional.linear
    _deepspeed()
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    return zero3_linear_wrap
