"""Saves in the background: what is written is what was there, whatever is trained meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from trainer_runs import make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint import held
from mm.trainer.checkpoint.meeting import Meeting
from mm.trainer.checkpoint.save import Moment, save
from mm.trainer.checkpoint.writer import Writer
from mm.trainer.loop import train

FORMS: dict[str, dict[str, Any]] = {
    "ema": {"stage_keys": {"ema": {"decay": 0.9}}},
    "schedule_free": {
        "stage_keys": {
            "optimizer": {"kind": "schedule_free_adamw", "lr": 1e-2},
            "schedule": {"shape": "constant", "warmup": 2},
        }
    },
    "two networks": {"objective": "toy_gan"},
    "teacher": {"objective": "toy_teacher"},
}


def moment(step: int, steady: dict[str, Tensor], other: dict[str, Tensor]) -> Moment:
    made = Moment.of({"step": step, "stage": 0, "data": {}}, {"model": steady | other})
    table = {n: h._replace(steady=n in steady) for n, h in made.files["model"].items()}
    return Moment(made.state, {"model": table})


def saved(root: Path) -> dict[str, list[float]]:
    found = checkpoint.newest(root)
    assert found is not None
    return {name: t.tolist() for name, t in found.tensors("model").items()}


class Slow:
    """`held.fill` that begins when it is let, but for the copies of the calling thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.may_begin, plain, main = threading.Event(), held.fill, threading.current_thread()

        def fill(pairs: list[tuple[Tensor, Tensor]]) -> None:
            if threading.current_thread() is not main:
                self.may_begin.wait(5)
            plain(pairs)

        monkeypatch.setattr(held, "fill", fill)


def test_an_update_waits_for_the_copies_and_other_tensors_are_copied_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, writer = Slow(monkeypatch), Writer(background=True)
    weight, buffer = torch.ones(3), torch.ones(2)
    writer.settle()  # nothing is under way
    writer(tmp_path, moment(1, {"weight": weight}, {"buffer": buffer}), keep_last=9)
    buffer.zero_()  # a forward pass may
    settled = threading.Event()
    update = threading.Thread(target=lambda: (writer.settle(), settled.set(), weight.zero_()))
    update.start()
    assert not settled.wait(0.1) and weight.tolist() == [1.0] * 3
    slow.may_begin.set()
    update.join()
    writer.wait()
    assert saved(tmp_path) == {"weight": [1.0] * 3, "buffer": [1.0] * 2}
    assert weight.tolist() == [0.0] * 3


def test_a_weight_that_is_changed_outside_a_step_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, writer, weight = Slow(monkeypatch), Writer(background=True), torch.ones(3)
    writer(tmp_path, moment(1, {"weight": weight}, {}), keep_last=9)
    weight.add_(1)
    slow.may_begin.set()
    with pytest.raises(RuntimeError, match="changed outside a step"):
        writer.wait()
    writer.settle()  # the next update does not hang
    assert checkpoint.newest(tmp_path) is None


def test_a_copy_that_fails_in_one_process_ends_the_save_of_all(tmp_path: Path) -> None:
    """At once: the others hear of it, as of a disk that is full."""
    store, raised = HashStore(), {}

    def fails() -> None:
        raise RuntimeError("changed outside a step")

    def work(rank: int) -> None:
        table = {"w": held.whole(torch.ones(2), 0, rank)}
        state = {"step": 1, "stage": 0, "data": {}}
        fill = fails if rank else lambda: None
        try:
            save(
                tmp_path,
                Moment(state, {"model": table}, fill=fill),
                9,
                meeting=Meeting(rank, 2, store, "1"),
            )
        except Exception as error:  # noqa: BLE001
            raised[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun < 10
    assert isinstance(raised[1], RuntimeError) and isinstance(raised[0], UserError)
    assert "process 1: RuntimeError: changed outside a step" in str(raised[0])
    assert checkpoint.newest(tmp_path) is None


CASES = [
    pytest.param(form, zero, marks=[pytest.mark.slow] * ((form, zero) != ("ema", 1)))
    for form in FORMS
    for zero in range(4)
]


@pytest.mark.parametrize("form,zero", CASES)
def test_what_is_written_while_steps_run_is_what_is_written_before_them(
    form: str, zero: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, at every save, though the copies begin late."""
    keep: dict[str, Any] = {"every": 1, "keep_last": 9}
    kind = {"stage": zero, "steps": 4, **FORMS[form]}
    plain = make_run(tmp_path, "plain", checkpoints=keep, **kind)
    train(plain)
    copy, main, late = held.fill, threading.current_thread(), []

    def fill(pairs: list[tuple[Tensor, Tensor]]) -> None:
        if threading.current_thread() is not main:
            time.sleep(0.1)
            late.append(len(pairs))
        copy(pairs)

    monkeypatch.setattr(held, "fill", fill)
    run = make_run(tmp_path, checkpoints=keep | {"background": True}, **kind)
    train(run)
    assert len(late) == 4 and all(late)
    for step in range(1, 5):
        folders = [r.folder / "checkpoints" / f"step_{step:06d}" for r in (plain, run)]
        files = sorted(p.name for p in folders[0].glob("*.safetensors"))
        assert len(files) >= 2
        for name in files:
            a, b = (f / name for f in folders)
            assert a.read_bytes() == b.read_bytes(), (step, name)
