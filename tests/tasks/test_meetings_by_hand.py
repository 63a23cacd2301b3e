"""Tasks shared between processes, here threads with a real store; settings of the judges."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from test_tasks_by_hand import Answers, data  # noqa: F401

from mm.data.modalities.base import get_modality
from mm.registry import TASKS
from mm.tasks import run
from mm.tasks.judges import Judge, linear_probe
from mm.tokenizers.text.bytes import BytesConfig


def in_a_launch_of(monkeypatch: pytest.MonkeyPatch, size: int) -> Any:
    """Its store, or None where nobody may be met."""
    store = dist.HashStore() if size > 1 else None
    here = threading.local()

    def meet() -> Any:
        assert store is not None, "alone, and asks for the others"
        return store, here.rank, size

    monkeypatch.setattr(run, "ranks", lambda: SimpleNamespace(world=size))
    monkeypatch.setattr(run, "_meet", meet)
    return SimpleNamespace(store=store, here=here)


def test_alone_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_launch_of(monkeypatch, 1)
    run.wait_for_all()
    run.give_up()
    tasks: Any = ["a", "b"]
    assert [(n, said["figures"]) for n, said in run.measure(tasks, str.upper)] == [  # type: ignore[arg-type]
        (0, "A"),
        (1, "B"),
    ]


def test_two_processes_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = in_a_launch_of(monkeypatch, 2)
    monkeypatch.setattr(run, "_meetings", iter([7, 7]))  # each process counts its own
    left = []

    def process(rank: int) -> None:
        launch.here.rank = rank
        run.wait_for_all()
        left.append(rank)

    first = threading.Thread(target=process, args=(0,), daemon=True)
    first.start()
    time.sleep(0.2)
    assert left == []
    process(1)
    first.join(5)
    assert sorted(left) == [0, 1]


def test_who_gives_up_tells_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = in_a_launch_of(monkeypatch, 2)
    launch.here.rank = 1
    run.give_up()
    assert launch.store.check([run.GIVEN_UP])


def test_seconds_of_a_task_are_to_the_hundredth(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.23456])
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    task: Any = "a"
    assert run._timed(task, lambda t: {"n": 1}) == {"figures": {"n": 1}, "seconds": 1.23}


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_judge_brings_features_to_one_scale_where_their_modality_asks(modality: str) -> None:
    model = Judge(modality).model
    asked = get_modality(modality).features().standardise
    assert hasattr(model, "named_steps") == asked
    classifier = model.named_steps["svc"] if asked else model
    assert (classifier.C, classifier.gamma, classifier.kernel) == (10.0, "scale", "rbf")


def test_the_bar_without_a_model_is_a_strongly_shrunk_regression() -> None:
    """C of 0.01: with that of 1 these noisy pictures are learnt by heart."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    labels = [str(n % 2) for n in range(80)]
    pictures = [
        np.clip(rng.normal(120 + 4 * (n % 2), 60, (16, 16, 3)), 0, 255).astype(np.uint8)
        for n in range(80)
    ]
    x = np.stack([p.reshape(-1) for p in pictures]) / 255
    scale = StandardScaler().fit(x[:40])
    x = scale.transform(x)
    shares = {
        C: float(
            (
                LogisticRegression(C=C, max_iter=200).fit(x[:40], labels[:40]).predict(x[40:])
                == np.array(labels[40:])
            ).mean()
        )
        for C in (0.01, 1.0)
    }
    assert shares[0.01] != shares[1.0]
    assert linear_probe(pictures[:40], labels[:40], pictures[40:], labels[40:]) == shares[0.01]


def test_a_tokenizer_of_bytes_is_given_the_file_as_it_is(data: Path) -> None:  # noqa: F811
    """Not the picture that it decodes to."""
    generator: Any = Answers()
    generator.tokenizers = {"image": BytesConfig(modality="image").build()}
    task: Any = TASKS.parse({"kind": "recognition", "data": data, "label": "pattern"}).build()
    item = task.items("test", generator)[0]
    assert bytes(item.sample.values["image"])[:4] == b"\x89PNG"
