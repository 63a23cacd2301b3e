"""How long an optimizer step of a model takes on this machine: a few are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mm.config import validate
from mm.launch.environment import cpu_threads, keep_freed_memory
from mm.model.model import LmConfig
from mm.own_data.training import Work
from mm.specs import Segment, TokenSpec
from mm.vocabulary import RESERVED, Vocabulary

STEPS = 4
IN_A_RUN = 1.3  # the update, the trainer's own work, held-out passes, a busier moment
ALONE = 0.3  # of a small model's step, what further threads do not make shorter


def step_seconds(model: Mapping[str, Any], work: Work) -> float:
    """Seconds of a step, forward and backward, as a run takes them (`IN_A_RUN`).

    The shortest of four after one that is not counted, on the device that `mm train` would take:
    what else runs makes a step longer, never shorter. On a CPU the steps are also made in one
    thread, by its processor time, which does not grow while others have the processor; the lesser
    counts. (That time in several threads does grow: each spins while it waits for one that lost
    its processor.)
    """
    import torch

    from mm.data.batching.collate import to_batch
    from mm.model.layer import init_weights
    from mm.trainer.engine.deepspeed import resolve_precision

    keep_freed_memory()  # as training does
    threads = cpu_threads()
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codes, values = work.n_ids - RESERVED - 2, work.values
    vocabulary = Vocabulary().add(TokenSpec("text", codes))
    if values is not None:
        grid = (values.side, values.side)
        of = TokenSpec(values.modality, 0, grid=grid, continuous=True, n_features=values.n_features)
        vocabulary = vocabulary.add(of)
    network = validate(LmConfig, model, "mm init: model").build(vocabulary)
    init_weights(network)
    network.to(device)
    batch = to_batch(_rows(work, codes), vocabulary, work.row).to(device)
    on_gpu = device.type == "cuda"
    mixed = resolve_precision("auto", device) != "fp32"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = network(batch).heads["tokens"].nll.mean()
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()

    seconds = _shortest(step, time.perf_counter)
    if not on_gpu:
        torch.set_num_threads(1)
        one = _shortest(step, time.process_time)
        torch.set_num_threads(threads)
        seconds = min(seconds, one * (ALONE + (1 - ALONE) / threads))
    return IN_A_RUN * seconds


def _shortest(step: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds of the shortest of `STEPS` steps after one more, as allocations are made in it."""
    taken = []
    for _ in range(1 + STEPS):
        start = clock()
        step()
        taken.append(clock() - start)
    return min(taken[1:])


def _rows(work: Work, codes: int) -> list[list[list[Segment]]]:
    """Documents of each row: one of ids, or of pictures and of ids, as `Work.values` says."""
    rng, values = np.random.default_rng(0), work.values
    text = lambda n: Segment("text", rng.integers(codes, size=n).astype(np.int32))
    if values is None:
        return [[[text(work.row - 2)]] for _ in range(work.rows)]
    cells = values.side**2
    pixels = rng.integers(256, size=(cells, values.n_features)).astype(np.uint8)
    picture = Segment(
        values.modality, np.full(cells, -1, np.int32), pixels, role="condition",
        grid=(values.side, values.side),
    )  # fmt: skip
    length = cells + 2 + 3
    rows: list[list[list[Segment]]] = [[] for _ in range(work.rows)]
    free = [work.row] * work.rows
    n_pictures = round(values.share * work.row * work.rows / length)
    for document, ids, n in (
        ([picture, text(1)], length, n_pictures),
        ([text(values.others - 2)], values.others, work.rows * work.row // values.others),
    ):
        for _ in range(n):
            row = max(range(work.rows), key=free.__getitem__)
            if free[row] >= ids:
                rows[row].append(document)
                free[row] -= ids
    return rows
