"""Which attention heads of a trained model look nearby alone, and the model without them.

B rows, T tokens, D model, H heads, G key heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from mm.batch import Batch
from mm.errors import UserError
from mm.model.context import Ctx
from mm.model.mixers.attention.attention import Attention
from mm.model.slices import shapes_of


def nearby_share(weights_BTHS: Tensor, ctx: Ctx, near: int, first: int) -> tuple[Tensor, int]:
    """Sums `(H,)` over queries of attention weights, and the number of queries.

    The weight on the ``near`` latest tokens, own one included, and on the ``first`` tokens of the
    document.

    Queries that can see nothing else are left out: their share is 1 in every head.
    """
    f = ctx.layout.fields
    time, document = f.position[..., 0], f.document
    counted = (document > 0) & (time >= near + first)
    gap = time[:, :, None] - time[:, None, :]
    close = ((gap >= 0) & (gap < near)) | (time < first)[:, None, :]
    close = close & (document[:, :, None] == document[:, None, :])
    share = (weights_BTHS * close[:, :, None]).sum(-1)  # (B, T, H)
    return share[counted].sum(0), int(counted.sum())


@torch.no_grad()
def recency_ratios(
    model: nn.Module, batches: Iterable[Batch], near: int = 16, first: int = 1
) -> dict[str, Tensor]:
    """Mean share of the attention weight that each head gives to nearby and to first tokens.

    A head near 1 does what a recurrence can; one near 0 needs its cache. The first tokens count
    because heads park there what they do not need.

    Args:
        model: a language model; its `attention` layers are looked at.
        batches: data to run it on (O(T^2) memory by row).
        near: latest tokens, the query's own included.
        first: tokens at the start of a document.
    Returns:
        name of the layer -> `(H,)` float64 in [0, 1].
    Raises:
        UserError: there is no `attention` layer, or no document is longer than ``near + first``.
    Source: Yan et al. 2024, RecurFormer (arXiv:2410.12850), its recency ratio.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Attention)}
    if not layers:
        raise UserError("this model has no attention layer whose heads could be ranked")
    total = {n: torch.zeros(layer.heads, dtype=torch.float64) for n, layer in layers.items()}
    seen = dict.fromkeys(layers, 0)

    def look(name: str, layer: Attention, args: tuple) -> None:
        x, ctx = args[:2]
        share, n = nearby_share(layer.weights(x, ctx), ctx, near, first)
        total[name] += share.double().cpu()
        seen[name] += n

    hooks = [
        layer.register_forward_pre_hook(lambda m, args, name=name: look(name, m, args))  # type: ignore[arg-type]
        for name, layer in layers.items()
    ]
    try:
        for batch in batches:
            model(batch, heads=())
    finally:
        for hook in hooks:
            hook.remove()
    if not min(seen.values()):
        raise UserError(f"no document is longer than near + first = {near + first} tokens")
    return {name: t / seen[name] for name, t in total.items()}


def most_recent(ratios: Mapping[str, Tensor], heads: int) -> dict[str, list[int]]:
    """The ``heads`` heads of each layer with the highest ratios, in the layer's order.

    Every layer gives up as many: one preset then serves all. Raises UserError where a layer would
    keep none.
    """
    for name, ratio in ratios.items():
        if heads >= len(ratio):
            raise UserError(f"{name or 'attention'}: {len(ratio)} heads cannot give up {heads}")
    return {n: sorted(r.topk(heads).indices.tolist()) for n, r in ratios.items()}


def without_heads(model: nn.Module, given_up: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Weights for the same model with some heads of each named layer left out.

    Each named `attention` layer becomes the first part of a `mixed_heads`, without those heads;
    what the other parts learn is theirs.

    Load them with ``strict=False`` into a model built with that pattern, then go on training.

    Raises:
        UserError: heads that share keys, or a layer whose projections are not dense matrices.
    Source: Yan et al. 2024, RecurFormer (arXiv:2410.12850): heads that stay are reused.
    """
    weights = {name: t.detach() for name, t in model.state_dict().items()}
    table = table_without_heads(model, weights, given_up)
    return {n: weights[s].clone() if isinstance(s, str) else s() for n, s in table.items()}


def table_without_heads(
    model: nn.Module, weights: Mapping[str, Tensor], given_up: Mapping[str, list[int]]
) -> dict[str, str | Callable[[], Tensor]]:
    """Of each tensor of `without_heads` the name that it had, or what makes it.

    ``model`` may be on the meta device, and ``weights`` are read when they are asked for.
    """
    table: dict[str, str | Callable[[], Tensor]] = {name: name for name in weights}
    modules, shapes = dict(model.named_modules()), shapes_of(weights)
    for name, gone in given_up.items():
        layer, where = modules[name], f"{name}.".lstrip(".")
        assert isinstance(layer, Attention)
        H = layer.heads
        if layer.kv_heads != H:
            raise UserError(f"{name or 'attention'}: {H} heads share {layer.kv_heads} keys")
        own = [k.removeprefix(where) for k in table if k.startswith(where)]
        if not {"qkv.weight", "out.weight"} <= {*own}:
            raise UserError(f"{name or 'attention'}: only dense projections can lose heads")
        stay = torch.tensor([h for h in range(H) if h not in set(gone)])
        for part in own:
            table[f"{where}parts.0.{part}"] = was = f"{where}{part}"
            del table[was]
            if (cut := _heads_in(part, len(shapes[was]), H, layer.head_dim)) is not None:
                table[f"{where}parts.0.{part}"] = lambda was=was, cut=cut, stay=stay: _select_heads(
                    weights[was], *cut, stay
                )
    return table


def _heads_in(part: str, dims: int, H: int, K: int) -> tuple[int, tuple[int, ...]] | None:
    """The axis of a tensor of `attention` that has heads, and how it parts; None: none has."""
    sizes = {"qkv.weight": (0, 3), "out.weight": (1, 1), "gate.weight": (0, 1)}
    by_head = {"sink": 1, "forget.gate.weight": 1, "forget.bias": 1, "shift.gates.weight": 2}
    if part in sizes:
        dim, n = sizes[part]
        return dim, (n, H, K)
    if part in by_head or (part.endswith("norm.weight") and dims == 2):
        return 0, (by_head.get(part, 1), H)
    return None


def _select_heads(t: Tensor, dim: int, parts: tuple[int, ...], stay: Tensor) -> Tensor:
    pieces = t.unflatten(dim, parts).index_select(dim + 1, stay)
    return pieces.flatten(dim, dim + len(parts) - 1)
