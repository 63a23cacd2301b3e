"""Fewer key heads for a trained model. H heads, G key heads, K head width, D model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.errors import UserError
from mm.model.mixers.attention.attention import Attention
from mm.model.slices import shapes_of
from mm.registry import SURGERIES
from mm.surgery.base import (
    Operated,
    Source,
    Surgery,
    assemble,
    empty_network,
    stack_of,
    with_stack,
)
from mm.vocabulary import Vocabulary


@SURGERIES.register("pool_heads")
class PoolHeads(Surgery):
    """Fewer key heads in every `attention` layer, each the mean of those that it replaces."""

    kind: Literal["pool_heads"] = "pool_heads"
    kv_heads: Annotated[int, Field(gt=0)] = 1

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        stack = stack_of(before.config, self.kind)
        old, shapes = empty_network(before.config, before.vocabulary), shapes_of(before.tensors)
        pooled = _pooled(old, shapes, before.tensors.__getitem__, self.kv_heads)
        mixers = {word: stack.mixer(word).to_dict() for word in dict.fromkeys(stack.words())}
        for mixer in mixers.values():
            if mixer["kind"] == "attention":
                mixer["kv_heads"] = self.kv_heads
        table: dict[str, Source] = {name: name for name in before.tensors}
        return assemble(before, with_stack(before.config, mixers=mixers), {**table, **pooled})


def mean_pooled(model: nn.Module, kv_heads: int) -> dict[str, Tensor]:
    """Weights for the same model with ``kv_heads`` key heads in every `attention` layer.

    Each key and value head is the mean of those that it replaces, all else is as it was.

    Load them into a model built with the new number, then go on training for a while (the paper: 5
    % of the first training).

    Raises:
        UserError: a layer's key heads do not divide into ``kv_heads`` groups, there is no
            `attention` layer, or its projection is not one dense matrix.
    Source: Ainslie et al. 2023, GQA (arXiv:2305.13245), section 2.1.
    """
    weights = {name: t.detach() for name, t in model.state_dict().items()}
    pooled = _pooled(model, shapes_of(weights), weights.__getitem__, kv_heads)
    return {name: pooled[name]() if name in pooled else t.clone() for name, t in weights.items()}


def _pooled(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    kv_heads: int,
) -> dict[str, Callable[[], Tensor]]:
    """What makes each tensor that is pooled; ``model`` may be on the meta device."""
    made: dict[str, Callable[[], Tensor]] = {}
    found = False
    for name, layer in model.named_modules():
        if not isinstance(layer, Attention):
            continue
        found = True
        H, G, K = layer.heads, layer.kv_heads, layer.head_dim
        if G % kv_heads:
            raise UserError(f"{name or 'attention'}: {G} key heads do not make {kv_heads} groups")
        key = f"{name}.qkv.weight".lstrip(".")
        if key not in shapes or shapes[key][0] != (H + 2 * G) * K:
            raise UserError(f"{name or 'attention'}: only a dense qkv can be pooled")

        def qkv(key: str = key, H: int = H, G: int = G, K: int = K) -> Tensor:
            q, kv = read(key).unflatten(0, (H + 2 * G, K)).split((H, 2 * G))
            return torch.cat((q, _means(kv, 2 * kv_heads))).flatten(0, 1)

        made[key] = qkv
        for part, n in (("k_norm.weight", kv_heads), ("shift.gates.weight", 2 * kv_heads)):
            own = f"{name}.{part}".lstrip(".")
            if len(shapes.get(own, ())) == 2:  # one a key head
                made[own] = lambda own=own, n=n: _means(read(own), n)
    if not found:
        raise UserError("this model has no attention layer whose key heads could be pooled")
    return made


def _means(rows: Tensor, n: int) -> Tensor:
    """`(G, ..)` to `(n, ..)`: means of as many neighbours."""
    return rows.unflatten(0, (n, len(rows) // n)).mean(1)
