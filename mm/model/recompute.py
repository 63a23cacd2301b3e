"""Activation checkpointing: what the backward pass needs is made again instead of kept.

torch's non-reentrant form only: the reentrant one loses gradients of returned States silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# false and true were the only values once
Recompute = Annotated[
    Literal["none", "full", "selective"],
    BeforeValidator(lambda v: {False: "none", True: "full"}[v] if isinstance(v, bool) else v),
    Field(
        description="activation checkpointing of every layer; selective: keep the results of "
        "matrix products with weights and of fused attention, make all others again"
    ),
]

aten = torch.ops.aten
# Costly to make again, and linear in the tokens. `bmm` is not among them: attention without a fused
# kernel would keep its (T, T) scores.
KEPT = frozenset(
    getattr(getattr(aten, name), "default")  # noqa: B009  pyright knows no operator by name
    for name in (
        "mm",
        "addmm",
        "convolution",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)


def _policy(ctx: Any, op: Any, *args: Any, **kw: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class _KeptOnly(TorchDispatchMode):
    """A mode of torch's own selective checkpointing that is shown the operators of `KEPT` alone.

    It numbers the calls of every operator that it is shown, and fails where the second forward pass
    makes more of them than the first. ZeRO stage 3 gathers and frees weights inside the layer, not
    always at the same places: those calls are no part of what is made again.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # as torch's own: a layer under this mode is compiled all the same

    def __init__(self, mode: TorchDispatchMode):
        super().__init__()
        self._mode = mode

    def __enter__(self) -> _KeptOnly:
        counter = getattr(self._mode, "func_counter", None)
        if counter is not None:  # every pass counts from 0
            counter.clear()
        return super().__enter__()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in KEPT:
            return func(*args, **(kwargs or {}))
        return self._mode.__torch_dispatch__(func, types, args, kwargs)


def _contexts() -> tuple[_KeptOnly, _KeptOnly]:
    first, again = create_selective_checkpoint_contexts(_policy)
    return _KeptOnly(first), _KeptOnly(again)


def resolve_mode(mode: str, layer: nn.Module) -> str:
    """``mode``, or "full" where a result that "selective" keeps would be written over."""
    over = any(getattr(module, "overwrites", False) for module in layer.modules())
    return "full" if mode == "selective" and over else mode


def run(mode: str, layer: nn.Module | Callable[..., Any], *args: Any) -> Any:
    """Call ``layer`` so that its backward pass makes again what ``mode`` does not keep.

    Source: Chen et al. 2016 (arXiv:1604.06174), full; Korthikanti et al. 2022 (arXiv:2205.05198),
    section 5, selective, by operator.

    Args:
        mode: "full": only the arguments are kept; "selective": also the results of `KEPT`;
            what `resolve_mode` gave for the layer.
        layer: draws nothing from global generators (they are not set back).
    """
    if mode == "full":
        return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(
        layer, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts
    )
