"""Values written after values: each place's prediction is what the next place reads.

N series, L places, C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mm.data.batching.borders import document_length
from mm.data.batching.collate import to_batch
from mm.decoders.books import laid_out
from mm.errors import UserError
from mm.specs import Segment
from mm.vocabulary import Vocabulary


@torch.no_grad()
def continue_values(
    model: Any,
    vocabulary: Vocabulary,
    modality: str,
    given: Sequence[np.ndarray],
    n: int,
    *,
    conditions: Sequence[Segment] = (),
    temperature: float = 0.0,
    seed: int = 0,
    max_places: int = 16384,
) -> list[np.ndarray]:
    """``n`` further places of each of ``given`` ``(L, C)``: ``(n, C)`` float32.

    The whole sequence is read again for each place.

    Args:
        conditions: what all of them are told after, their parts named.
        temperature: 0 = the mean of each prediction; else spread of what is drawn.
        max_places: of one forward; bounds memory.
    Raises:
        UserError: the model has no head for these values.
    """
    if modality not in model.heads:
        raise UserError(
            f"the model cannot write '{modality}': model.heads has none of that name, only "
            f"{', '.join(model.heads)}"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    out: list[np.ndarray] = []
    (conditions,) = laid_out(model, [conditions])
    before = document_length(conditions)
    longest = before + max((len(x) for x in given), default=0) + n + 2
    size = max(1, max_places // longest)
    for begin in range(0, len(given), size):
        some = [np.asarray(x, np.float32) for x in given[begin : begin + size]]
        for _ in range(n):
            told = [Segment(modality, np.full(len(x), -1), x, role="target") for x in some]
            rows = [[[*conditions, segment]] for segment in told]
            batch = to_batch(rows, vocabulary)
            B, T = batch.layout.shape
            last = torch.tensor(
                [b * T + before + len(x) for b, x in enumerate(some)], dtype=torch.int32
            )
            batch = replace(batch, places={modality: last}).to(device)
            dist = model(batch, heads=(modality,), loss=False).heads[modality].dist
            new = dist.sample(generator, temperature).float().cpu().numpy()
            some = [np.concatenate((x, row[None])) for x, row in zip(some, new, strict=True)]
        out += [x[len(x) - n :] for x in some]
    return out
