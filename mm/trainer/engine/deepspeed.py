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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.errors import UserError
from mm.launch import environment
from mm.run import EngineConfig
from mm.schedule import Ema
from mm.trainer.engine.gradient_order import GradientOrder
from mm.trainer.engine.zero_shards import Shards, Span, join_slices
from mm.trainer.optimizers.base import ShardOptimizer

log = logging.getLogger("mm.trainer")

Read = Callable[[str, int, int], Tensor]


def resolve_precision(asked: str, device: torch.device) -> str:
    """Replace "auto" by autocast_bf16 where the hardware multiplies bf16 matrices, else by fp32."""
    if asked != "auto":
        return asked
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else environment.cpu_has_bf16()
    return "autocast_bf16" if fast else "fp32"


def deepspeed_json(config: EngineConfig, precision: str, n_params: int) -> dict[str, Any]:
    """Derive DeepSpeed's JSON from the typed config, for a network of ``n_params`` parameters."""
    zero_stage = config.effective_zero_stage
    # DeepSpeed allocates a whole bucket each step: its default of 2 GB costs fresh pages every time
    bucket = min(n_params + n_params % 2, 200_000_000)  # DeepSpeed wants it even
    out: dict[str, Any] = {
        # bookkeeping only: micro-batches and boundaries are ours
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.grad_clip if zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": 10**12,
    }
    if precision == "autocast_bf16":
        out["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": ["torch.nn.Identity"],
        }
    elif precision == "bf16":
        out["bf16"] = {"enabled": True}
    return out


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
        n_params = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
        # DeepSpeed rounds all weights to bf16 and keeps masters only of those that train.
        self.frozen = frozen or {
            name: p.detach().to("cpu", copy=True)
            for name, p in module.named_parameters()
            if precision == "bf16" and not p.requires_grad
        }
        with communicating() as deepspeed:
            self.ds, self.optimizer, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_json(config, precision, n_params),
                dist_init_required=False,
            )
        # torch 2.14 deprecates two collectives that DeepSpeed calls in every stage 3 step
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module="torch.distributed.c10d_logger"
        )
        self.shards = self._shards()
        if isinstance(self.base, ShardOptimizer):
            self.base.shards = self.shards
        self.ema = ema
        self.updates = 0  # applied
        self._averages: dict[Tensor, Tensor] = {}
        self._restart_averages()
        if self.zero_stage == 0:
            self.ds.enable_backward_allreduce = (
                False  # `reduce` below does it, so that the norm is known before the step
            )
        if self.zero_stage > 1 and dist.get_world_size() > 1:
            self._order = GradientOrder(self.trainable())

    def __call__(self, *args: Any, **kw: Any) -> Any:
        return self.ds(*args, **kw)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss`` (scaled by the caller)."""
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
        if self.zero_stage:
            return None
        self.ds.buffered_allreduce_fallback()
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
        self._materialise()
        self.updates = int(scalars.get("ema_updates", 0))
        if self.ema is not None and "ema_updates" not in scalars:
            log.info("the checkpoint has no EMA: it starts from its weights")
            self._restart_averages()
        try:
            with torch.no_grad():
                for x, spans in self.shards.spans.items():
                    for key, value in self.states(x).items():
                        if key == "ema" and "ema_updates" not in scalars:
                            continue
                        if not isinstance(value, Tensor):
                            kind = type(value)
                            self.base.state[x][key] = kind(scalars[key])
                        elif value.dim() == 0:
                            value.fill_(scalars[key])
                        else:
                            self._load_state(read, x, key, value, spans)
        except KeyError as error:
            raise UserError(
                f"the checkpoint has no optimizer state {error}: it was made with another "
                "optimizer; set stages.N.optimizer back, or use another run name: name=..."
            ) from error

    def _load_state(
        self, read: Read, x: Tensor, key: str, value: Tensor, spans: Sequence[Span]
    ) -> None:
        listed = key in getattr(self.base, "per_parameter", ())
        for i, span in enumerate(spans):
            name = f"{key}/{span.name}"
            if listed:
                value[i] = read(name, 0, value[i].numel()).view(value[i].shape)
            elif value.shape == x.shape:
                self.shards.put(value, span, lambda start, n, name=name: read(name, start, n))
            else:
                value.copy_(read(name, 0, value.numel()).view(value.shape))

    def load_masters(self, read: Read) -> None:
        """Set the fp32 masters (they differ from the weights only where these are bf16).

        ``read``: elements ``start : start + n`` of a parameter; only this rank's are read.
        """
        if self.zero_stage:
            with torch.no_grad():
                for x, spans in self.shards.spans.items():
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

    def _materialise(self) -> None:
        """Create the optimizer's states as its first step would."""
        base, groups = self.base, self.base.param_groups
        flats = list(self.shards.spans)
        if isinstance(base, ShardOptimizer):
            for flat in flats:
                base.prepare(flat, groups[self.shards.groups[flat]])
            return
        # a step of rate 0 on zero gradients
        hyper = {k: v for k, v in groups[0].items() if k != "params"} | {"lr": 0.0}
        before = [flat.detach().clone() for flat in flats]
        base.param_groups = [{**hyper, "params": flats}]
        try:
            for flat in flats:
                flat.grad = torch.zeros_like(flat)
            base.step()
        finally:
            base.param_groups = groups
        with torch.no_grad():
            for flat, old in zip(flats, before, strict=True):
                flat.grad = None
                flat.copy_(old)  # -0.0 became 0.0


def linear_of_stage(zero_stage: int) -> Callable[..., Tensor]:
    """What `torch.nn.functional.linear` is at a ZeRO stage: stage 3 keeps no cast of the weight."""
    if zero_stage < 3:
        return torch.nn.functional.linear
    _deepspeed()
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    return zero3_linear_wrap
