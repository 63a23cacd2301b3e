"""Few pictures of classes: named from the values of their patches, drawn by codes.

What a codebook leaves of a photograph is too little to learn its class from some hundreds of them:
docs/lab-notes.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from mm.own_data.look import Found
from mm.own_data.plan import Chosen
from mm.own_data.tokenizers import CELLS, PATCH, PIXELS, TokenizerPlan

SAMPLES = 8000  # to train on that are enough without varied copies
NAMING = 0.85  # share of the samples whose class is learnt; the others are drawn from it
ROW = 256  # ids
LR, EMA = 1.0e-3, 0.998
PASSES = 14  # over all copies
VIEWS, VIEWED = 8, 1000  # of a picture that is measured, and the most of those
GRID = {"kind": "sum", "position": {"kind": "grid", "max_cells": CELLS**2}}


class Values(NamedTuple):
    """Pictures of values among the documents of a step.

    Args:
        side: patches of a picture's side, of ``n_features`` numbers each.
        share: of the ids of a step that stand in their documents.
        others: ids of every other document.
    """

    modality: str
    side: int
    n_features: int
    share: float
    others: int


def few_pictures(found: Found, n_train: int) -> bool:
    """Pictures of classes and nothing else, so few that a class would be learnt by heart."""
    return {*found.modalities} <= {"image", "text"} and bool(found.classes) and n_train < SAMPLES


def directions(text: str) -> Chosen:
    """Tasks by weight. ``text``: modality of the class words."""
    values = {f"{PIXELS}>{text}": NAMING, f"{text}>image": round(1 - NAMING, 2)}
    return Chosen(values, "read by values, written by codes; naming the class counts most")


def lengths(plans: Sequence[TokenizerPlan]) -> tuple[int, int]:
    """Ids of a picture's values with its class word, and of its codes with it."""
    of = {p.modality: p.longest for p in plans}
    word = sum(round(p.mean) for p in plans if p.modality not in (PIXELS, "image"))
    return of[PIXELS] + word, of["image"] + word


def mean_ids(plans: Sequence[TokenizerPlan]) -> float:
    """Ids of a sample as it is drawn: of either direction."""
    read, written = lengths(plans)
    return NAMING * read + (1 - NAMING) * written


def values(plans: Sequence[TokenizerPlan]) -> Values:
    """Pictures of a step, for its time."""
    read, written = lengths(plans)
    cells = next(p.longest for p in plans if p.modality == PIXELS) - 2
    return Values(PIXELS, math.isqrt(cells), 3 * PATCH**2, NAMING * read / mean_ids(plans), written)


def augment(found: Found, plans: Sequence[TokenizerPlan]) -> list[Any]:
    """Transforms of the data, as far as a picture's side allows."""
    assert found.image is not None
    coloured = found.image.coloured > 0.01
    side = PATCH * values(plans).side
    change = {
        "kind": "augment_image",
        "modality": PIXELS,
        "mirror": 0.5 if coloured else 0.0,
        "shift": side // 8 if coloured else max(1, side // 24),
    }
    if not coloured:
        return [Chosen(change, "each time moved a little")]
    change |= {"zoom": 0.3, "colour": 0.3, "erase": 0.4}
    why = "each time otherwise: mirrored, a part, moved, in other light, a square hidden"
    return [Chosen(change, why)]


def model() -> dict[str, Any]:
    """A small model that sees a picture's patches at once, through convolutions."""
    near = "convolutions over the picture, a vector a patch: few pictures need neighbours"
    return {
        "kind": "lm",
        "d_model": Chosen(128, "few pictures: more passes of a smaller model"),
        "mask": Chosen("prefix", "all patches of a picture see each other"),
        "embedder": Chosen(GRID, "which cell of the picture a code stands in"),
        "adapters": {
            PIXELS: Chosen({"kind": "patches", "patch": PATCH, "width": 48, "blocks": 1}, near)
        },
        "backbone": {
            "kind": "stack",
            "depth": 3,
            "pattern": Chosen("attention", "it alone looks both ways in a prefix"),
            "mixers": {"attention": {"heads": 4}},
            "ffn": {"kind": "swiglu", "hidden": 352},
            "block": Chosen(
                {"kind": "prenorm", "dropout": 0.1}, "few pictures are learnt by heart without"
            ),
        },
    }


def average() -> Chosen:
    """Of the weights, which is what is measured and saved."""
    return Chosen({"decay": EMA}, "the mean of about the last 500 steps is measured and saved")


def views(found: Found, split: str, share: float) -> Chosen | None:
    """Views of a picture that is measured, itself one; None where there are too many to measure."""
    if (found.splits.get(split) or found.held_out(share)) > VIEWED:
        return None
    return Chosen(VIEWS, f"also the answer that it and {VIEWS - 1} varied copies give most often")
