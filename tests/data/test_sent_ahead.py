"""Batches that go to their device while the step before runs are the same batches."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from stream_cases import CASES
from torch import Tensor

from mm.batch import Batch
from mm.trainer.env import TrainerEnv
from mm.trainer.transfer import Sender

CPU = torch.device("cpu")


def tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    batch.map_tensors(lambda t: (found.append(t), t)[1])
    return found


@pytest.mark.parametrize("kind", ["packed-transform", "bucketed", "items"])
def test_what_arrives_is_what_was_made_in_one_buffer(kind: str, data: Path) -> None:
    env, sender = TrainerEnv(0, CPU, "fp32"), Sender(CPU)
    stream, plain = CASES[kind](data).build(), CASES[kind](data).build()
    threads = []

    def made(batch: Batch) -> None:
        threads.append(threading.current_thread().name)
        env.send_ahead(sender, batch)

    stream.made = made
    for _ in range(3):
        for sent, other in zip(stream.next(), plain.next(), strict=True):
            here, there = tensors(other), tensors(env.take(sent))
            assert [(t.dtype, t.shape) for t in there] == [(t.dtype, t.shape) for t in here]
            assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
            assert len({t.untyped_storage().data_ptr() for t in there if t.numel()}) == 1
            assert all(t.data_ptr() % 16 == 0 for t in there)
            assert sent.sent == []  # its copy is kept no longer than it is needed
            again = tensors(env.take(sent))
            assert all(torch.equal(a, b) for a, b in zip(here, again, strict=True))
    assert set(threads) == {"mm-data"}
    stream.close()


def test_a_changed_batch_is_not_the_one_that_was_sent(data: Path) -> None:
    from dataclasses import replace

    env = TrainerEnv(0, CPU, "fp32")
    stream = CASES["packed-transform"](data).build()
    stream.made = partial(env.send_ahead, Sender(CPU))
    (batch, *_) = stream.next()
    changed = replace(batch, weight=batch.weight + 1)
    assert torch.equal(env.take(changed).weight, batch.weight + 1)
    stream.close()
