"""Greedy decoding by blocks: further heads propose, the first head verifies, in one forward each.

N sequences, K further heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.vocabulary import Vocabulary

DRAFTS = "drafts"


class Blocks(NamedTuple):
    """Sequences with what was written, and how many forwards each took."""

    ids: list[np.ndarray]
    forwards: list[int]


@torch.no_grad()
def decode_blocks(
    model: Any, vocabulary: Vocabulary, given: Sequence[np.ndarray], n: int, *, block: int = 0
) -> Blocks:
    """``n`` ids after each of ``given`` (ids of the vocabulary), the likeliest one at a time.

    What is written is what the first head alone writes, whatever the others propose. Source: Stern
    et al. 2018 (arXiv:1811.03115), sections 3 and 4: verification merged with the next proposal,
    exact match.

    Args:
        block: ids of a proposal at most, the first head's included; 0 = as many as there are
            heads, 1 = without the others.
    Raises:
        UserError: the model's head has no further ones.
    """
    head = model.heads["tokens"]
    if block != 1 and not hasattr(head, "ahead"):
        raise UserError(
            "decoding by blocks: model.heads.tokens has no further heads: train it with "
            "{kind: multi_token, ahead: 3}"
        )
    size = min(block or head.ahead + 1, getattr(head, "ahead", 0) + 1)
    known = [np.asarray(ids, np.int64) for ids in given]  # verified
    ends = [len(ids) + n for ids in known]
    proposed = [np.zeros(0, np.int64) for _ in known]
    forwards = [0] * len(known)
    while live := [i for i, ids in enumerate(known) if len(ids) < ends[i]]:
        told = _forward(model, vocabulary, [(known[i], proposed[i]) for i in live])
        for i, (first, blocks) in zip(live, told, strict=True):
            forwards[i] += 1
            # Place j says what follows the j-th proposed id; an id is right if the place before it
            # says so.
            right = 0
            while right < len(proposed[i]) and proposed[i][right] == first[right]:
                right += 1
            accepted = np.append(proposed[i][:right], first[right])
            known[i] = np.concatenate((known[i], accepted))[: ends[i]]
            proposed[i] = blocks[right][: size - 1]
    return Blocks(known, forwards)


def _forward(
    model: Any, vocabulary: Vocabulary, rows: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A row: the likeliest next ids of its last places `(P,)`, and further ones `(P, K)`.

    Its places are the last known one and those of the proposal.
    """
    device = next(model.parameters()).device
    streams = [np.concatenate(row) for row in rows]
    T = max(map(len, streams))
    ids = np.full((len(rows), T), -1, np.int32)
    docs, places = [], []
    for b, (stream, (known, _)) in enumerate(zip(streams, rows, strict=True)):
        ids[b, : len(stream)] = stream
        docs.append([Doc(len(stream), modality=vocabulary.modality_of(stream))])
        places.append(np.arange(len(known) - 1, len(stream)) + b * T)
    batch = Batch.of_ids(torch.from_numpy(ids), Layout.from_rows(docs, T))
    flat = torch.from_numpy(np.concatenate(places)).to(torch.int32)
    batch = Batch(batch.layout, batch.ids, batch.targets, batch.weight, {"tokens": flat})
    out = model(
        batch.to(device), heads=("tokens",), loss=False, return_intermediates=frozenset({DRAFTS})
    )
    dist = out.heads["tokens"].dist
    first = dist.logits.argmax(-1).cpu().numpy()
    drafts: Tensor | None = getattr(dist, DRAFTS, None)
    more = np.zeros((len(first), 0), np.int64)
    if drafts is not None:
        more = drafts.argmax(-1).cpu().numpy()
    borders = np.cumsum([len(p) for p in places])[:-1]
    return list(zip(np.split(first, borders), np.split(more, borders), strict=True))
