"""Any-to-any: one sample of several modalities becomes one directed task, such as image to text."""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from mm.config import Config
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform

ROLE = Segment._fields.index("role")


class Task(NamedTuple):
    """``conditions`` come first and cost no loss, then ``targets``."""

    conditions: tuple[str, ...]
    targets: tuple[str, ...]


def parse_task(text: str) -> Task:
    """Parse ``"image+text>audio"`` (conditions > targets) or ``"text"`` (no condition).

    Raises ValueError.
    """
    left, arrow, right = text.replace(" ", "").rpartition(">")
    conditions = tuple(left.split("+")) if arrow else ()
    targets = tuple(right.split("+"))
    names = (*conditions, *targets)
    if not all(names) or len(set(names)) != len(names):
        raise ValueError(
            f"task '{text}' is not of the form 'image>text', 'image+text>audio' or 'text'"
        )
    return Task(conditions, targets)


@TRANSFORMS.register("any_to_any")
class AnyToAnyConfig(Config):
    """Draw a task by weight among those that the sample has the modalities for.

    Without one the sample is filtered. A sample of several segments of one modality has an order of
    its own: it stays as it is.
    """

    kind: Literal["any_to_any"] = "any_to_any"
    tasks: Annotated[
        dict[str, Annotated[float, Field(ge=0)]],
        Field(
            description="`conditions>targets`, such as image+text>audio, or targets alone -> weight"
        ),
    ]
    condition_dropout: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description=(
                "share of samples whose conditions become the null condition (for guidance)"
            ),
        ),
    ] = 0.1
    repeats: Annotated[
        int, Field(ge=1, description="times that the conditions are written (JRT-Prompt: 2)")
    ] = 1

    @field_validator("tasks")
    @classmethod
    def _check(cls, tasks: dict[str, float]) -> dict[str, float]:
        for text in tasks:
            parse_task(text)
        if not any(tasks.values()):
            raise ValueError("tasks: no task has a weight above 0")
        return tasks

    @classmethod
    def smallest(cls) -> AnyToAnyConfig:
        return cls(tasks={"image>text": 1.0, "text>image": 1.0, "text": 1.0})

    def build(self) -> AnyToAny:
        return AnyToAny(
            {parse_task(t): w for t, w in self.tasks.items() if w > 0},
            self.condition_dropout,
            self.repeats,
        )


class AnyToAny(Transform):
    """See `AnyToAnyConfig`. ``repeats``: Arora et al. 2024 (arXiv:2407.05483), JRT-Prompt."""

    by_length = True

    def __init__(self, tasks: dict[Task, float], condition_dropout: float, repeats: int = 1):
        self.tasks, self.condition_dropout, self.repeats = tasks, condition_dropout, repeats
        self._possible: dict[frozenset[str], tuple[list[Task], list[float]]] = {}

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        have = {s.modality: s for s in segments}
        if len(have) < len(segments):
            return segments
        tasks, borders = self._choices(frozenset(have))
        if not tasks:
            return None
        draw, drop = rng.random(2)
        at = min(bisect_right(borders, draw), len(tasks) - 1)
        conditions, targets = tasks[at]
        if (
            drop < self.condition_dropout
        ):  # all together: guidance compares with no condition at all
            first = [Segment(m, None, role="condition") for m in conditions]
        else:
            first = [_with_role(have[m], "condition") for m in conditions]
        return first * self.repeats + [_with_role(have[m], "target") for m in targets]

    def _choices(self, have: frozenset[str]) -> tuple[list[Task], list[float]]:
        if have not in self._possible:
            fits = {
                t: w for t, w in self.tasks.items() if have.issuperset((*t.conditions, *t.targets))
            }
            total, at, borders = sum(fits.values()), 0.0, []
            for weight in fits.values():
                at += weight / total
                borders.append(at)
            self._possible[have] = (list(fits), borders)
        return self._possible[have]


def _with_role(s: Segment, role: str) -> Segment:
    """``s._replace(role=role)``, in a third of the time."""
    if s.role == role:
        return s
    return Segment(*s[:ROLE], role, *s[ROLE + 1 :])  # pyright: ignore[reportCallIssue]
