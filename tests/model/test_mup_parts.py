"""muP of heads, adapters, embedders: no matrix moves what is said farther in a wider model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.batch import Values
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.heads.multi_token import DRAFTS
from mm.model.layer import init_weights
from mm.registry import ADAPTERS, EMBEDDERS, HEADS, NETWORKS
from mm.specs import TokenSpec
from mm.vocabulary import extend_vocabulary

WIDTHS = (32, 512)
STEP, PLACES, SEEDS = 1e-5, 6, 3
# A rate that is missing, or one too many, changes the slope by 1. Widths of their own make it
# fall: what such a layer says to a read-out is not aligned with it at the start.
LEAST, MOST = -0.75, 0.45


def build(plug: str, kind: str, width: int) -> tuple[Any, Any, str]:
    """A model of ``width`` with the member, the member, and its path."""
    registry = {"HEADS": HEADS, "ADAPTERS": ADAPTERS, "EMBEDDERS": EMBEDDERS}[plug]
    config = registry.get(kind).smallest()
    member: dict[str, Any] = {"kind": kind, **config.to_dict()}
    specs = [TokenSpec("text", 20), TokenSpec("audio", 8, 3)]
    if "delays" in member:
        member["delays"] = {"audio": (0, 0, 0)}
    if kind == "resampler":  # attention is widened by more heads
        member["heads"] = width // 8
    given: dict[str, Any] = {"kind": "lm", "d_model": width, "mup_base": WIDTHS[0]}
    given["heads"] = {"tokens": "softmax"} | ({"member": member} if plug == "HEADS" else {})
    if plug == "ADAPTERS":
        given["adapters"] = {"picture": member}
        n: Any = getattr(config, "d_in", 0)
        specs.append(TokenSpec("picture", 0, continuous=True, n_features=n))
    if plug == "EMBEDDERS":
        given["embedder"] = member
    model = NETWORKS.parse(given).build(extend_vocabulary(specs))
    init_weights(model)
    model.double().eval()
    paths = {"HEADS": "heads.member", "ADAPTERS": "adapters.picture", "EMBEDDERS": "embedder"}
    return model, model.get_submodule(paths[plug]), paths[plug]


def said(plug: str, part: Any, width: int, seed: int) -> Tensor:
    """Numbers that the member makes of hidden states or values of size 1, or of all ids."""
    draw = torch.Generator().manual_seed(seed)
    ctx = Ctx(Layout.from_rows([[Doc(PLACES)]]), Causal(), return_intermediates=frozenset({DRAFTS}))
    if plug == "ADAPTERS":
        zero = part.zero_item(torch.device("cpu")).double()
        data = torch.randn(4, *zero.shape[1:], generator=draw, dtype=torch.float64)
        each = torch.full((4,), zero.shape[1], dtype=torch.int32)
        return part(Values(data, each, torch.arange(4) * 8, each), ctx).x.flatten()
    if plug == "EMBEDDERS":
        ids = torch.arange(part.n_ids)[None, :, None]
        return part(ids, Ctx(Layout.plain(1, part.n_ids), Causal())).y.flatten()
    hidden = torch.randn(1, PLACES, width, generator=draw, dtype=torch.float64)
    more: dict[str, Any] = {}
    if hasattr(part, "delays"):
        first = part.vocabulary.range("audio").first
        more["known"] = first + torch.tensor([[1, 9]] * PLACES)
    dist = part(hidden, ctx, torch.arange(PLACES), **more).dist
    held = dist if isinstance(dist, tuple) else vars(dist).values()
    found = [x for x in held if isinstance(x, Tensor) and x.is_floating_point()]
    every = torch.cat([x.flatten() for x in found])
    return every[every.isfinite()]


def move(plug: str, kind: str, width: int, seed: int) -> dict[str, float]:
    """How far a step of each matrix, of Adam's first size, moves what is said."""
    torch.manual_seed(seed)
    model, part, path = build(plug, kind, width)
    rates, out = model.rates(), {}
    before = said(plug, part, width, seed)
    probe = torch.randn(before.shape, generator=torch.Generator().manual_seed(1)).double()
    matrices = {name: p for name, p in part.named_parameters() if p.dim() > 1}
    gradients = torch.autograd.grad(before @ probe, [*matrices.values()], allow_unused=True)
    for (name, p), gradient in zip(matrices.items(), gradients, strict=True):
        assert gradient is not None and gradient.any(), (
            f"{name} is not reached: the law sees nothing"
        )
        kept = p.detach().clone()
        with torch.no_grad():
            p += STEP * rates[f"{path}.{name}"] * gradient.sign()
            moved = said(plug, part, width, seed) - before
            p.copy_(kept)
        out[name] = float(moved.detach().square().mean().sqrt()) / STEP
    return out


@pytest.mark.parametrize(
    "plug,kind",
    [
        *(("HEADS", kind) for kind in HEADS),
        *(("ADAPTERS", kind) for kind in ADAPTERS),
        *(("EMBEDDERS", kind) for kind in EMBEDDERS),
    ],
)
def test_no_matrix_moves_what_is_said_farther_in_a_wider_model(plug: str, kind: str) -> None:
    small, large = ([move(plug, kind, width, seed) for seed in range(SEEDS)] for width in WIDTHS)
    for name in small[0]:
        far = [math.prod(each[name] for each in at) ** (1 / SEEDS) for at in (small, large)]
        slope = math.log(far[1] / far[0]) / math.log(WIDTHS[1] / WIDTHS[0])
        assert LEAST < slope < MOST, f"{name}: moves by width ** {slope:.2f}"
