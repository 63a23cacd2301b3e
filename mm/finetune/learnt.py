"""What is learnt of each source: the user's data in their directions, the base's as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm.data.modalities.base import raw_modality
from mm.data.transforms.any_to_any import parse_task
from mm.finetune.base import Base
from mm.finetune.data import Amount, Data
from mm.own_data.plan import Chosen

DROPOUT = 0.1  # of conditions, for guidance


def objective(base: Base) -> dict[str, Any]:
    """Next tokens, weighed as the base was trained."""
    own = own_objective(base)
    out: dict[str, Any] = {"kind": "next_token"}
    if own.get("kind") == "next_token" and own.get("weights"):
        out["weights"] = Chosen(own["weights"], "as the base was trained")
    return out


def sources(
    base: Base, data: Data, amount: Amount, again: Sequence[Mapping[str, Any]], share: float
) -> list[dict[str, Any]]:
    """The user's shards, and a share of the base's own.

    Each has the transforms of the base's data, then its own directions.
    """
    before = base.run.stages[-1].data.to_dict().get("transform") if base.run else None
    before = list(before or ())
    mine: dict[str, Any] = {"path": str(data.tokens)}
    if (tasks := directions_of(base, data, amount)) is not None:
        fits = [t for t in before if t.get("modality") in (None, *amount.modalities)]
        mine["transform"] = [*fits, any_to_any(tasks)]
    if not again:
        return [mine]
    total = sum(source["weight"] for source in again)
    why = f"{share:.0%} of the samples are the base's own: less is forgotten (--replay)"
    rest: list[dict[str, Any]] = []
    for source in again:
        weight: Any = round(share * source["weight"] / total, 4)
        entry = {**source, "weight": Chosen(weight, why) if not rest else weight}
        if known := directions(own_objective(base).get("transform")):
            entry["transform"] = [*before, any_to_any(known)]
        rest.append(entry)
    return [{**mine, "weight": round(1 - share, 4)}, *rest]


def directions_of(base: Base, data: Data, amount: Amount) -> Chosen | None:
    """Tasks of the user's data by weight; None where they have an order of their own, or one way.

    Where they have classes, naming them alone is learnt: to draw a class from some samples of one
    kind would change how the base draws it.
    """
    have = set(amount.modalities)
    if data.is_chat or len(have) < 2:
        return None
    known = directions(own_objective(base).get("transform"))
    fits = lambda task: have.issuperset(m for side in parse_task(task) for m in side)
    named = {task: weight for task, weight in known.items() if fits(task)}
    text = next((m for m in sorted(have, reverse=True) if raw_modality(m).is_text), None)
    if not named and text:
        named = {f"{m}>{text}": 1.0 for m in sorted(have) if m != text}
    classes = {t: w for t, w in named.items() if parse_task(t).targets == (text,) and ">" in t}
    if data.found and data.found.classes and classes:
        return Chosen(classes, "classes are named; how the base draws them stays as it is")
    return Chosen(named, "the base's directions that the data have") if named else None


def own_objective(base: Base) -> dict[str, Any]:
    """What the base's last stage learnt; {} where its run is not there."""
    return base.run.stages[-1].objective.to_dict() if base.run else {}


def any_to_any(tasks: Any) -> dict[str, Any]:
    """The transform of these tasks."""
    return {"kind": "any_to_any", "condition_dropout": DROPOUT, "tasks": tasks}


def directions(transform: Any) -> dict[str, float]:
    """Tasks of the `any_to_any` among the transforms of an objective."""
    for each in transform if isinstance(transform, list) else [transform]:
        if isinstance(each, Mapping) and each.get("kind") == "any_to_any":
            return {task: float(weight) for task, weight in each["tasks"].items()}
    return {}
