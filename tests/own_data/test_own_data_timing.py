"""How `mm init` measures a step on this machine, whatever else runs there."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from mm.own_data import pictures, timing, training
from mm.own_data.plan import plain
from mm.own_data.timing import step_seconds


def test_the_time_of_a_step_is_measured_with_pictures() -> None:
    values = pictures.Values("pixels", 4, 192, share=0.6, others=69)
    work = training.Work(n_ids=800, row=256, rows=1, values=values)
    assert 0 < step_seconds(plain(pictures.model()), work) < 60
    rows = timing._rows(work, codes=700)
    have = [s.modality for row in rows for document in row for s in document]
    ids = sum(len(s.ids) + 2 for row in rows for document in row for s in document)
    assert have.count("pixels") == 7 and 200 < ids <= 256  # .6 of the ids are theirs


def test_a_busy_machine_does_not_lengthen_the_measured_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others have the processors two thirds of the time, and threads that wait spin."""
    work = training.Work(n_ids=800, row=128, rows=2)
    model = {"kind": "lm", "d_model": 64, "backbone": {"kind": "stack", "depth": 2}}

    def shortest(step: Callable[[], None], clock: Callable[[], float]) -> float:
        step()
        return 20.0 if clock is time.perf_counter else float(torch.get_num_threads())

    monkeypatch.setattr(timing, "_shortest", shortest)
    taken = {}
    for threads in (1, 2):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        taken[threads] = step_seconds(model, work)
    torch.set_num_threads(1)
    assert taken[1] == pytest.approx(timing.IN_A_RUN), "one second of the processor"
    assert 0.5 * taken[1] < taken[2] < 0.8 * taken[1]
