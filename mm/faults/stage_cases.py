"""Faults at the border of two stages: what the first leaves must reach the second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mm.faults.bench import Bench
from mm.faults.case import KILLED, resume_and_compare
from mm.faults.compare import differences
from mm.trainer.health.signals import INTERRUPTED

STEPS = 4  # of each stage
EMA = {"ema": {"decay": 0.9}}
SCHEDULE_FREE = {
    "optimizer": {"kind": "schedule_free_adamw", "lr": 1e-2},
    "schedule": {"shape": "constant", "warmup": 2},
}


def two_stages(bench: Bench, name: str, form: dict[str, Any], **change: Any) -> dict[str, Any]:
    """Config of a run of two equal stages, with an average in the form of ``form``."""
    config = bench.config(bench.fresh(name), steps=STEPS, **change)
    (stage,) = config["stages"]
    return {**config, "stages": [{**stage, **form}, {**stage, **form}]}


def border_with_ema(bench: Bench, quick: bool) -> Iterator[str]:
    yield from _stopped_at_border(bench, quick, EMA)


def border_with_schedule_free(bench: Bench, quick: bool) -> Iterator[str]:
    yield from _stopped_at_border(bench, quick, SCHEDULE_FREE)


def _stopped_at_border(bench: Bench, quick: bool, form: dict[str, Any]) -> Iterator[str]:
    """A signal in the last step of a stage; kill -9 before and in the first step of the next."""
    faults: list[tuple[dict[str, Any], int]] = [
        ({"signal": "SIGTERM", "phase": "step", "step": STEPS}, INTERRUPTED),
        ({"signal": "SIGKILL", "phase": "data", "step": STEPS + 1}, KILLED),
        ({"signal": "SIGKILL", "phase": "step", "step": STEPS + 1}, KILLED),
    ]
    for zero in (1,) if quick else (0, 1, 2, 3):
        for fault, code in faults[:2] if quick else faults:
            config = two_stages(bench, "border", form, zero=zero)
            ended = bench.train(config, faults={"signal": fault})
            yield resume_and_compare(bench, config, ended, code)


def rollback_across_border(bench: Bench, quick: bool) -> Iterator[str]:
    """Two bad steps after the border: as a run whose second stage begins past their batches.

    Then the same with a kill -9 after the return to the checkpoint, and a resume.
    """
    for form in (EMA,) if quick else (EMA, SCHEDULE_FREE):
        for zero in (1,) if quick else (0, 1, 2, 3):
            engine = {"max_skips": 1}
            config = two_stages(bench, "back", form, zero=zero, engine=engine)
            past = {"past": {"step": STEPS, "batches": 2}}
            whole = bench.whole(config, faults=past)
            nan = {"nan": {"step": STEPS + 1, "times": 2}}
            ended = bench.train(config, faults=nan)
            events = bench.folder(config) / "events.jsonl"
            back = events.read_text() if events.is_file() else "no events"
            if ended.codes != [0] or f'"to": {STEPS}' not in back:
                yield f"exit codes {ended.codes}, {back}: {ended.said[-300:]}"
                continue
            yield differences(whole, bench.folder(config))
            config = two_stages(bench, "back", form, zero=zero, engine=engine)
            kill = {"signal": {"signal": "SIGKILL", "phase": "step", "step": STEPS + 3}}
            ended = bench.train(config, faults=nan | kill)
            again = bench.train(config)
            if ended.codes != [KILLED] or again.codes != [0]:
                yield f"exit codes {ended.codes}, {again.codes}: {again.said[-300:]}"
            else:
                yield differences(whole, bench.folder(config))
