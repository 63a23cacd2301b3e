"""What DeepSpeed is told: its JSON, from the typed config."""

from __future__ import annotations

from typing import Any, NamedTuple

from mm.engine_config import EngineConfig
from mm.errors import UserError

BUCKET = 200_000_000  # elements of a message, at most, where nothing is said


class Where(NamedTuple):
    """What a network trains on."""

    device: str  # cpu, cuda
    world: int  # processes


def overlaps(config: EngineConfig, where: Where) -> bool:
    """Whether gradients are summed while the backward still runs."""
    asked = config.communication.overlap_comm
    return where.device == "cuda" and where.world > 1 if asked is None else asked


def bucket_size(config: EngineConfig, n_params: int) -> int:
    """Elements of a message; even, as DeepSpeed wants it.

    DeepSpeed allocates a whole bucket each step: its default of 2 GB costs fresh pages every time.
    """
    size = min(n_params, config.communication.bucket_size or BUCKET)
    return size + size % 2


def boundary_is_told(config: EngineConfig, where: Where) -> bool:
    """Whether DeepSpeed is told which backward is the last of a step, instead of seeing the step.

    At stage 1 it sums gradients in the backward only then: others are accumulated.
    """
    return config.effective_zero_stage == 1 and overlaps(config, where)


def deepspeed_json(
    config: EngineConfig, precision: str, n_params: int, where: Where
) -> dict[str, Any]:
    """Derive DeepSpeed's JSON for a network of ``n_params`` parameters. Raises UserError."""
    refuse(config, precision, where)
    stage, wire, offload = config.effective_zero_stage, config.communication, config.offload
    bucket = bucket_size(config, n_params)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": stage > 0 and overlaps(config, where),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3 and wire.bucket_size is not None:
        zero["stage3_prefetch_bucket_size"] = bucket
    if wire.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = wire.hpz_partition_size
    if wire.quantized_weights:
        zero["zero_quantized_weights"] = True
    for key, place in (
        ("offload_optimizer", offload.optimizer),
        ("offload_param", offload.parameters),
    ):
        if place != "device":
            zero[key] = {"device": place, "pin_memory": where.device == "cuda"}
            if place == "nvme":
                zero[key]["nvme_path"] = str(offload.folder)
    out: dict[str, Any] = {
        # bookkeeping only: micro-batches and boundaries are ours
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": boundary_is_told(config, where),
        "gradient_clipping": config.grad_clip if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the optimizers here update host tensors, too
        "zero_optimization": zero,
        "steps_per_print": 10**12,
    }
    if wire.dtype != "auto":
        out["communication_data_type"] = wire.dtype
    if precision == "autocast_bf16":
        out["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            # a module without parameters: gradients travel as `Engine` says
            "lower_precision_safe_modules": ["torch.nn.Identity"],
        }
    elif precision == "bf16":
        out["bf16"] = {"enabled": True}
    return out


def refuse(config: EngineConfig, precision: str, where: Where) -> None:
    """Raise UserError for what cannot work here, or is known to be wrong."""
    wire, why = config.communication, {}
    if wire.quantized_gradients:
        why["communication.quantized_gradients"] = (
            "DeepSpeed's kernels read gradients as float16, and they are bf16 or fp32 here: they "
            "would be other numbers; use communication.dtype: bf16"
        )
    if wire.quantized_weights and where.device != "cuda":
        why["communication.quantized_weights"] = "its kernels need a GPU"
    elif wire.quantized_weights and precision == "autocast_bf16":
        why["communication.quantized_weights"] = (
            "DeepSpeed refuses it under autocast: use precision: bf16"
        )
    if config.offload.parameters == "nvme" and precision != "bf16":
        why["offload.parameters"] = (
            f"nvme rounds weights in {precision} to 16 bits on the way (DeepSpeed 0.19.8, seen in "
            "the losses); say cpu, or precision: bf16"
        )
    if where.world % wire.hpz_partition_size:
        fits = [n for n in range(2, where.world + 1) if where.world % n == 0]
        why["communication.hpz_partition_size"] = (
            f"{wire.hpz_partition_size} does not divide {where.world} processes; these do: "
            + (", ".join(map(str, fits)) or "none")
        )
    for key, text in why.items():
        raise UserError(f"engine.{key}: {text}")
