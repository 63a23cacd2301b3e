"""Which parameters train and how fast: full fine-tuning, or LoRA of a rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mm.errors import UserError
from mm.finetune.base import Base
from mm.own_data.plan import Chosen

Asked = Literal["auto", "full", "lora", "qlora"]
METHODS: tuple[Asked, ...] = ("full", "lora", "qlora")  # from dear to cheap
RANKS = ((100_000, 8), (1_000_000, 16), (10_000_000, 32))  # ids to train on -> rank
LARGEST_RANK = 64
LORA_LR, WIDTH, POWER = 5.0e-4, 2000, 0.78
TIMES = 10  # LoRA's rate over that of all weights


class Method(NamedTuple):
    """``model`` and ``surgery`` are put into the YAML."""

    name: Asked
    why: str
    model: Mapping[str, Any]
    lr: Chosen
    weight_decay: float


def candidates(base: Base, ids: int, asked: Asked) -> list[Method]:
    """Methods in the order in which they are tried, until one fits the device.

    Args:
        ids: to train on, without varied copies.
    Raises:
        UserError: no such method.
    """
    if asked != "auto" and asked not in METHODS:
        raise UserError(f"--method {asked}: give auto, {', '.join(METHODS)}")
    if asked != "auto":
        return [method(base, ids, asked, "asked for with --method")]
    size = f"{ids:,} ids for {base.parameters:,} parameters"
    few = ids < base.parameters
    why = f"{size}: adapters forget less" if few else f"{size}: enough for all weights"
    smaller = "the method before it does not fit this device"
    first = METHODS[1:] if few else METHODS
    return [method(base, ids, name, smaller if i else why) for i, name in enumerate(first)]


def method(base: Base, ids: int, name: Asked, why: str) -> Method:
    """A method with its rank and learning rate.

    Source of the rates: Schulman et al. 2025, LoRA Without Regret: LoRA's best rate is about ten
    times that of all weights, does not depend on the rank, and falls with the width.
    """
    width = int(base.config.get("d_model") or WIDTH)
    rate = LORA_LR * (WIDTH / width) ** POWER
    if name == "full":
        lr = Chosen(two_digits(rate / TIMES), f"by the width {width}, for all weights")
        model = {"linear": base.dense} if base.is_adapted else {}
        return Method(name, why, model, lr, 0.01)
    rank = next((rank for most, rank in RANKS if ids < most), LARGEST_RANK)
    linear: dict[str, Any] = {
        "kind": "lora",
        "rank": Chosen(rank, f"by the {ids:,} ids to train on"),
        "alpha": 2 * rank,
    }
    if name == "qlora":
        linear["base_layer"] = {"kind": "nf4", "double": True}
    elif base.dense != {"kind": "dense"}:  # its biases, or its own kind of matrix
        linear["base_layer"] = base.dense
    lr = Chosen(two_digits(rate), f"by the width {width}; {TIMES} times that of all weights")
    return Method(name, why, {"linear": Chosen(linear, why)}, lr, 0.0)


def two_digits(rate: float) -> float:
    """Two digits."""
    return float(f"{rate:.1e}")
