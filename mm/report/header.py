"""What a run is, in a line: model, size, steps, tokens, epochs, machine, time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.report import words
from mm.report.charts import short
from mm.report.read import RunData
from mm.report.start import epochs, parameters
from mm.report.times import total


def chips(run: RunData) -> str:
    """Facts of a run as a definition list; what is not known is left out."""
    model = run.config.get("model")
    model = model if isinstance(model, Mapping) else {"kind": model}
    inner = model.get("backbone")
    backbone: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {}
    seconds = total(run)
    commit = lookup(run, "commit")
    facts: list[tuple[str, Any]] = [
        ("model", model.get("kind")),
        ("pattern", model.get("pattern") or backbone.get("pattern")),
        ("depth", model.get("depth") or backbone.get("depth")),
        ("width", model.get("d_model") or model.get("d") or backbone.get("d_model")),
        ("parameters", parameters(run)),
        ("steps", f"{run.steps:,}" if run.steps else None),
        ("tokens seen", tokens_seen(run)),
        ("epochs", epochs(run)),
        ("modalities", ", ".join(_modalities(run)) or None),
        ("device", lookup(run, "device")),
        ("processes", lookup(run, "world")),
        ("precision", lookup(run, "precision")),
        ("ZeRO stage", _engine(run)),
        ("seed", run.config.get("seed")),
        ("time", words.duration(seconds) if seconds else None),
        ("commit", commit[:10] + "+" * commit.endswith("+") if isinstance(commit, str) else None),
    ]
    return words.chips(
        {name: _brief(v) for name, v in facts if isinstance(v, (str, int, float)) and v != ""}
    )


def tokens_seen(run: RunData) -> str | None:
    """Tokens of all steps, as the run counted them; of one that did not, speed times seconds."""
    if "tokens/seen" in run.metrics:
        return short(run.metrics["tokens/seen"].values[-1])
    rate, seconds = (run.metrics.get(f"perf/{k}") for k in ("tokens_per_second", "step_seconds"))
    if rate is None or seconds is None:
        return None
    of = dict(zip(seconds.steps, seconds.values, strict=True))
    each = [v * of[s] for s, v in zip(rate.steps, rate.values, strict=True) if s in of]
    # Steps that were not logged had about as many.
    return short(sum(each) / len(each) * max(run.steps, len(each))) if each else None


def lookup(run: RunData, *names: str) -> Any:
    """The first of ``names`` that start, environment, results or the newest metrics know."""
    for place in (run.start, run.environment, run.results, run.last_line):
        for name in names:
            for key, value in place.items():
                if key.split("/")[-1] == name and type(value) in (int, float, str):
                    return value
    return None


def _engine(run: RunData) -> Any:
    engine = run.config.get("engine")
    return engine.get("zero_stage") if isinstance(engine, Mapping) else None


def _modalities(run: RunData) -> list[str]:
    shares = [
        n.removeprefix("tokens/").removesuffix("_share")
        for n in run.metrics
        if n.startswith("tokens/") and n.endswith("_share")
    ]
    return shares or list(run.tokenizers)


def _brief(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > 9999:
        return short(float(value)) if abs(value) < 1e100 else "–"
    return str(value)[:120]
