"""What a model says of documents that are given: their nats, by modality."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from mm.data.batching.borders import document_length
from mm.data.batching.codebooks import CODES
from mm.data.batching.collate import to_batch
from mm.decoders.books import laid_out
from mm.decoders.prompts import require_causal
from mm.specs import Segment
from mm.vocabulary import Vocabulary


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


@torch.no_grad()
def sequence_nll(
    model: nn.Module,
    vocabulary: Vocabulary,
    documents: Sequence[Sequence[Segment]],
    *,
    max_places: int = 16384,
) -> list[dict[str, tuple[float, int]]]:
    """Score documents: for each, modality -> (nats summed over its targets, number of targets).

    Args:
        documents: segments with the roles of training; only targets are scored, their ends
            included.
        max_places: places of one forward, padding included; bounds memory.
    Raises:
        UserError: the model's mask shows a target what it predicts: what it says of it is no score.
    """
    for modality in sorted({s.modality for d in documents for s in d if s.role == "target"}):
        require_causal(model, vocabulary, modality)
    device = next(model.parameters()).device
    documents = laid_out(model, documents)
    lengths = np.array([document_length(d) for d in documents])
    names = ("", *vocabulary.modalities)
    scores: list[dict[str, tuple[float, int]]] = [{} for _ in documents]
    order = list(np.argsort(lengths, kind="stable"))
    while order:
        longest = int(lengths[order[-1]])
        some = [order.pop() for _ in range(min(len(order), max(1, max_places // max(longest, 1))))]
        b = to_batch([[documents[i]] for i in some], vocabulary)
        heads = [h for h in ("tokens", CODES) if len(b.places.get(h, ()))]
        if not heads:
            continue
        with evaluating(model):
            out = model(b.to(device), heads=heads)
        for head in heads:
            places = b.places[head].long()
            nll = out.heads[head].nll.double().cpu().numpy()
            number = np.ones(len(places), np.int64)
            if head == CODES:
                number = (b.targets.flatten(0, 1)[places, 1:] >= 0).sum(-1).numpy()
            row = (places // b.layout.shape[1]).numpy()
            modality = b.labels["target_modality"].flatten()[places].numpy()
            for r, i in enumerate(some):
                for m in np.unique(modality[row == r]):
                    mine = (row == r) & (modality == m)
                    nats, n = scores[i].get(names[m], (0.0, 0))
                    scores[i][names[m]] = (
                        nats + float(nll[mine].sum()),
                        n + int(number[mine].sum()),
                    )
    return scores
