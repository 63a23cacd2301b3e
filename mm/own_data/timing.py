"""How long an optimizer step of a model takes on this machine: a few are made."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from mm.config import validate
from mm.launch.environment import cpu_threads, keep_freed_memory
from mm.model.model import LmConfig
from mm.specs import Segment, TokenSpec
from mm.vocabulary import RESERVED, Vocabulary

STEPS = 5
OPTIMIZER = 1.15  # the update of the weights and the trainer's own work, beside both passes


def step_seconds(model: Mapping[str, Any], n_ids: int, row: int, rows: int) -> float:
    """Seconds of a step over ``rows`` rows of ``row`` ids, forward and backward, with `OPTIMIZER`.

    The shortest of five after one that is not counted, on the device that `mm train` would take:
    what else runs makes a step longer, never shorter. On a CPU it is the time that the processors
    worked for this process, which others still lengthen by the caches that they empty.
    """
    import torch

    from mm.data.batching.collate import to_batch
    from mm.model.layer import init_weights
    from mm.trainer.engine.deepspeed import resolve_precision

    keep_freed_memory()  # as training does
    threads = cpu_threads()
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codes = n_ids - RESERVED - 2
    vocabulary = Vocabulary().add(TokenSpec("text", codes))
    network = validate(LmConfig, model, "mm init: model").build(vocabulary)
    init_weights(network)
    network.to(device)
    ids = np.random.default_rng(0).integers(codes, size=(rows, row - 2))
    documents = [[[Segment("text", line.astype(np.int32))]] for line in ids]
    batch = to_batch(documents, vocabulary, row, rows).to(device)
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else lambda: time.process_time() / threads
    mixed = resolve_precision("auto", device) != "fp32"
    taken = []
    for _ in range(1 + STEPS):
        start = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = network(batch).heads["tokens"].nll.mean()
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return OPTIMIZER * min(taken[1:])
