"""Coordinate check of muP: how far activations move in the first steps, over the model's width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mm.batch import Batch
from mm.layout import Doc, Layout
from mm.model.layer import init_weights
from mm.registry import NETWORKS, OPTIMIZERS

WIDTHS = (64, 128, 256, 512)
HEAD_DIM = 32
B, T = 4, 32  # rows and tokens of the one batch


class Row(NamedTuple):
    """Mean absolute change of the activations of a ``place`` since the start.

    ``parametrisation``: "mup" or "standard".
    """

    parametrisation: str
    width: int
    step: int
    place: str
    change: float


def config(width: int, base: int | None, depth: int = 2, pattern: str = "attention") -> Any:
    """A language model of a width: more heads, not wider ones."""
    mixers = {"attention": {"heads": width // HEAD_DIM, "head_dim": HEAD_DIM}}
    used = {word: mixers[word] for word in mixers if word in pattern}
    backbone = {"kind": "stack", "depth": depth, "pattern": pattern, "mixers": used}
    return NETWORKS.parse(
        {"kind": "lm", "d_model": width, "backbone": backbone, "mup_base": base, "code_init": False}
    )


def batch(seed: int = 0) -> Batch:
    """Random bytes, the same for all widths."""
    ids = torch.randint(16, 80, (B, T, 1), generator=torch.Generator().manual_seed(seed)).int()
    places = torch.arange(B * T).view(B, T)[:, :-1].flatten().int()
    layout = Layout.from_rows([[Doc(T)] for _ in range(B)], T)
    return Batch(layout, ids, ids.roll(-1, 1), torch.ones(B, T), {"tokens": places})


def coordinates(
    width: int,
    *,
    base: int | None,
    lr: float = 3e-3,
    steps: int = 4,
    optimizer: str = "adamw",
    depth: int = 2,
    seed: int = 0,
) -> list[Row]:
    """Train one batch for some steps and measure every place after each.

    Args:
        width: of the model.
        base: width of muP's base, or None for the standard parametrisation.
        lr: learning rate, the same for all widths.
    Returns:
        Rows of steps 1 to ``steps``; places: inputs of the layers, "hidden" and "logits".
    """
    torch.manual_seed(seed)
    model = config(width, base, depth).build()
    init_weights(model)
    rule = OPTIMIZERS.parse({"kind": optimizer, "lr": lr, "weight_decay": 0.0}).build(model)
    data = batch(seed)
    return_intermediates = frozenset({"hidden", *(f"hidden.{i}" for i in range(1, depth))})
    first: dict[str, torch.Tensor] = {}
    rows = []
    for step in range(steps + 1):
        with torch.no_grad():
            out = model(data, return_intermediates=return_intermediates, loss=False)
            found = {**out.intermediates, "logits": out.heads["tokens"].dist.logits}
        if step == 0:
            first = found
        for place in sorted(found) if step else ():
            change = (found[place] - first[place]).abs().mean().item()
            rows.append(Row("standard" if base is None else "mup", width, step, place, change))
        rule.zero_grad()
        model(data).heads["tokens"].nll.mean().backward()
        rule.step()
    return rows


def slopes(rows: Iterable[Row]) -> dict[str, float]:
    """Power of the width that the change of each place grows with, at the last step."""
    rows = list(rows)
    last = max(row.step for row in rows)
    out = {}
    for place in dict.fromkeys(row.place for row in rows):
        at = [row for row in rows if row.place == place and row.step == last]
        x = torch.tensor([math.log(row.width) for row in at], dtype=torch.float64)
        y = torch.tensor([math.log(max(row.change, 1e-12)) for row in at], dtype=torch.float64)
        x = x - x.mean()
        out[place] = float((x * (y - y.mean())).sum() / (x * x).sum())
    return out


def check(widths: Sequence[int] = WIDTHS, **settings: Any) -> list[Row]:
    """Both parametrisations over ``widths``, the smallest of which is muP's base."""
    return [
        row
        for base in (min(widths), None)
        for width in sorted(widths)
        for row in coordinates(width, base=base, **settings)
    ]


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw the changes over the width, log-log.

    One panel a parametrisation, one line a step and place.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row.parametrisation for row in rows))
    figure = Figure(figsize=(5 * len(kinds), 4.5), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    places = sorted({row.place for row in rows})
    last = max(row.step for row in rows)
    for axes, kind in zip(panels, kinds, strict=True):
        mine = [row for row in rows if row.parametrisation == kind]
        grown = slopes(mine)
        for i, place in enumerate(places):
            for step in range(1, last + 1):
                at = [row for row in mine if row.place == place and row.step == step]
                said = f"{place} (width^{grown[place]:.2f})" if step == last else None
                axes.plot(
                    [row.width for row in at],
                    [row.change for row in at],
                    marker="o",
                    markersize=3,
                    color=f"C{i}",
                    alpha=0.3 + 0.7 * step / last,
                    label=said,
                )
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="width", title=kind)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel(f"mean |change| of activations, steps 1 to {last}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
