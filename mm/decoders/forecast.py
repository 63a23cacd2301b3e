"""How a series goes on: drawn continuations, their quantiles as a table and as a picture.

N continuations, H points, C channels, Q quantiles.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.modalities.base import raw_modality
from mm.decoders.prompts import require_causal
from mm.decoders.values import continue_values
from mm.errors import UserError
from mm.specs import ModalityTokenizer, Segment
from mm.vocabulary import Vocabulary

HORIZON = 24  # points
DRAWS = 100
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = 3  # times the horizon, of what was given, in a picture
ENDING = ".csv"


def is_series(modality: str) -> bool:
    """Whether raw values of a token modality are points in time."""
    return raw_modality(modality).kind == "time_series"


def continue_series(
    model: Any,
    vocabulary: Vocabulary,
    tokenizer: ModalityTokenizer,
    series: Sequence[np.ndarray],
    horizon: int,
    *,
    conditions: Sequence[Segment] = (),
    temperature: float = 1.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """``horizon`` further points of each of ``series`` ``(L, C)``: ``(H, C)`` float32.

    Args:
        conditions: what all of them are told after.
        temperature: 0 = the mean of each place's prediction.
    Raises:
        UserError: the model has no head for these values, or its mask shows what comes after.
    """
    modality = tokenizer.spec.modality
    require_causal(model, vocabulary, modality)
    codes = tokenizer.encode(series)
    first: Any = codes[0]
    points = len(tokenizer.decode([first._replace(side={})])[0]) // len(first.values)
    new = continue_values(
        model,
        vocabulary,
        modality,
        [np.asarray(code.values) for code in codes],
        -(-horizon // points),  # places
        conditions=conditions,
        temperature=temperature,
        seed=seed,
    )
    sides = [{k: v for k, v in code.side.items() if k != "points"} for code in codes]
    pairs = zip(codes, new, sides, strict=True)
    made = tokenizer.decode([code._replace(values=v, side=side) for code, v, side in pairs])
    return [x[:horizon] for x in made]


def forecast(
    generator: Any,
    prompt: Mapping[str, Any],
    to: str,
    horizon: int = HORIZON,
    *,
    draws: int = DRAWS,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The series of ``prompt`` `(L, C)`, and how it may go on `(N, H, C)`, both float32.

    Args:
        generator: `mm.decoders.generate.Generator`.
        prompt: modality -> raw value or the path of its file; that of ``to`` is gone on with, the
            others are conditions.
        temperature: of what is drawn; 0 = one continuation, of means.
    Raises:
        UserError: no series in the prompt, or the model does not predict such values.
    """
    from mm.decoders.raws import read_raw

    to = generator.modality(to)
    own = {generator.modality(name): raw for name, raw in prompt.items()}
    if to not in own:
        raise UserError(f"'{to}' goes on with a series: give one, --{to.replace('_', '-')} FILE")
    tokenizer = generator.tokenizer(to)
    given = read_raw(to, own.pop(to), tokenizer)
    (conditions,) = generator.segments([own], to) if own else ([],)
    told = continue_series(
        generator.model,
        generator.vocabulary,
        tokenizer,
        [given] * (draws if temperature else 1),
        horizon,
        conditions=conditions,
        temperature=temperature,
        seed=seed,
    )
    return given, np.stack(told)


def write_forecast(given: np.ndarray, draws: np.ndarray, path: str | Path) -> tuple[Path, Path]:
    """Write quantiles of ``draws`` as CSV, and a picture of them beside it.

    A row a point and channel: ``point`` counts on from the series, ``mean``, and a column a
    quantile. Returns both files.

    Raises:
        UserError: the suffix is not .csv.
    """
    path = Path(path)
    check_ending(path)
    path = path.with_suffix(ENDING)
    between = np.quantile(draws.astype(np.float64), QUANTILES, axis=0)  # (Q, H, C)
    mean = draws.astype(np.float64).mean(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["point", "channel", "mean", *(f"q{q:g}" for q in QUANTILES)])
        for h in range(draws.shape[1]):
            for c in range(draws.shape[2]):
                numbers = (mean[h, c], *between[:, h, c])
                rows.writerow([len(given) + h, c, *(f"{x:.9g}" for x in numbers)])
    picture = path.with_suffix(".png")
    _plot(given, between, picture)
    return path, picture


def check_ending(path: Path) -> None:
    """Raises UserError unless a forecast can be written there."""
    if path.suffix.lower() not in ("", ENDING):
        raise UserError(
            f"{path}: a forecast is written as {ENDING}, with a picture beside it: write -o "
            f"{path.with_suffix(ENDING)}"
        )


def _plot(given: np.ndarray, between: np.ndarray, file: Path) -> None:
    """A panel a channel: what was given at the end, the median, and half and nine tenths."""
    from matplotlib.figure import Figure

    _, H, C = between.shape
    panels = min(C, 8)
    figure = Figure(figsize=(9, 1.2 + 2.4 * panels), layout="constrained")
    at = np.arange(len(given), len(given) + H)
    begin = max(0, len(given) - SHOWN * H)
    for c, axes in enumerate(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]):
        axes.plot(np.arange(begin, len(given)), given[begin:, c], color="black", label="given")
        low, below, median, above, high = between[:, :, c]
        axes.fill_between(at, low, high, color="C0", alpha=0.2, linewidth=0, label="5 to 95 %")
        axes.fill_between(at, below, above, color="C0", alpha=0.35, linewidth=0, label="25 to 75 %")
        axes.plot(at, median, color="C0", marker="." if H == 1 else "", label="median")
        axes.grid(True, alpha=0.3)
        axes.set_ylabel(f"channel {c}" if C > 1 else "value")
        if c == 0:
            above_axes = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
            axes.legend(ncols=4, frameon=False, fontsize=8, **above_axes)
    axes.set_xlabel("point")
    figure.savefig(file, dpi=120)
