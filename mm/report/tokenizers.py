"""The tokenizers of a run: what they are, what they keep, and how they were trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mm.report import media
from mm.report.curves import curves
from mm.report.read import RunData
from mm.report.words import WORDS, chips, pretty, spread

BEFORE = ("original", "source", "input", "real", "before", "target", "reference")
AFTER = ("reconstructed", "reconstruction", "decoded", "output", "after", "recon", "rec")
SPECTRA = "spectrograms"
STRIPS = ("reconstructions", SPECTRA)  # of mm tokenizer eval: originals in a row above
NOT_SHOWN = ("tokenizer", "modality", "alerts")
CODES = ("vocab_size", "n_codebooks")  # of a tokenizer that makes some
MAX_PAIRS = 10


def tokenizers(run: RunData) -> str:
    """Each tokenizer: what `mm tokenizer eval` measured, before/after, and its own curves."""
    parts = dict(run.tokenizers)
    if run.reconstructions or run.evaluation:
        parts = {run.name: run, **parts}
    return "".join(_section(run, name, part) for name, part in parts.items())


def _section(run: RunData, name: str, part: RunData) -> str:
    pairs = reconstructions(part.reconstructions)
    if not pairs and part is not run:
        pairs = _of_training(part)
    alerts = part.evaluation.get("alerts")
    told = "".join(
        f'<p class="alert">{escape(str(alert))}</p>'
        for alert in (alerts if isinstance(alerts, list) else ())
    )
    measured = {_named(k): v for k, v in part.evaluation.items() if k not in NOT_SHOWN}
    if not measured and part is not run:
        spec = _spec(run, name)
        how = f"mm tokenizer eval {part.folder} --data SHARDS --out {part.folder / 'eval'} "
        how += f"--json {part.folder / 'eval.json'}"
        told = (
            '<p class="note">What it keeps of held-out data was not measured; that does: '
            f"<code>{escape(how)}</code></p>"
        )
        if spec.pop("continuous", False):
            told = '<p class="note">The values as they are, which the model reads: no codes.</p>'
            spec = {k: v for k, v in spec.items() if k not in CODES}
        measured = {_named(k): v for k, v in spec.items()}
    table = chips(measured) + told
    drawn = "" if part is run else curves(part)
    more = (
        f"<details><summary>Training curves of this tokenizer ({part.steps:,} "
        f"steps)</summary>{drawn}</details>"
        if drawn
        else ""
    )
    if not (pairs or table or more):
        return ""
    size = f" <small>{part.parameters:,} parameters</small>" if part.parameters else ""
    return f"<h3>{escape(pretty(name))}{size}</h3>{table}{pairs}{more}"


def _of_training(part: RunData) -> str:
    """Pairs from the newest samples that a tokenizer's training wrote."""
    steps = [step for one in part.samples for step in one.files]
    pairs, files = [], []
    for one in part.samples:
        made = one.files.get(max(steps), [])
        originals = [v for v in (one.prompt or {}).values() if isinstance(v, Path)]
        if originals and made:
            pairs.append({"before": originals[0], "after": made[0]})
        files += made
    shown = _pairs(pairs) if pairs else reconstructions(files)
    return f'{shown}<p class="note">At step {max(steps):,} of its training.</p>' if shown else ""


def _named(figure: str) -> str:
    """``psnr_db`` to ``PSNR dB``, ``n_codebooks`` to ``codebooks``."""
    words = figure.removeprefix("n_").split("_")
    return " ".join(WORDS.get(word, word) for word in words)


def _spec(run: RunData, modality: str) -> dict[str, Any]:
    """What the run's vocabulary says of a tokenizer."""
    ranges = run.vocabulary.get("ranges")
    for each in ranges if isinstance(ranges, list) else ():
        if isinstance(each, Mapping) and each.get("modality") == modality:
            known = {k: v for k, v in each.items() if k != "modality"}
            return known | {"fingerprint": str(known.get("fingerprint", ""))[:12]}
    return {}


def reconstructions(files: Sequence[Path]) -> str:
    """Originals beside what the tokenizer made of them; a file without a partner stands alone."""
    groups: dict[str, dict[str, Path]] = {}
    alone = []
    for file in files:
        words = re.split(r"[_\-. ]", file.stem)
        before = any(w in BEFORE for w in words)
        role = "before" if before else "after" if any(w in AFTER for w in words) else ""
        # The number that a sample's file begins with is its own, the item's comes behind.
        if len(words) > 2:
            words = words[1:]
        key = "_".join(w for w in words if w not in BEFORE and w not in AFTER)
        if role:
            groups.setdefault(f"{file.parent.name}/{key}{file.suffix}", {})[role] = file
        else:
            alone.append(file)
    shown = [_pairs(spread(list(groups.values()), MAX_PAIRS))] if groups else []
    shown += [
        media.figure(
            file,
            f"{pretty(file.stem)}{': originals above' if file.stem in STRIPS else ''}",
            strip=file.stem in STRIPS,
        )
        for file in alone[:MAX_PAIRS]
        if not (groups and file.stem == SPECTRA)  # each clip stands above with its own
    ]
    return "".join(shown)


def _pairs(pairs: Sequence[Mapping[str, Path]]) -> str:
    """Before and after beside each other."""
    made = (
        "".join(media.figure(pair[r], r, small=True) for r in ("before", "after") if r in pair)
        for pair in pairs
    )
    return (
        f'<div class="pairs">{"".join(f"""<div class="pair">{one}</div>""" for one in made)}</div>'
    )
