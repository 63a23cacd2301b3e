"""The fixed batches of a held-out loss, with what the figures of each modality stand beside.

B rows, T tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mm.batch import Batch
from mm.data.batching.codebooks import CODES
from mm.errors import UserError
from mm.tasks.chance import nats_at
from mm.trainer.log.metrics import BytesPerToken
from mm.trainer.ranks import most, on_any
from mm.trainer.sequence import data_ranks
from mm.trainer.stage import StageState, build
from mm.vocabulary import MASK, Vocabulary

SPLIT, SEED = "val", 0  # of every run: figures of runs with other seeds compare
NO_SPLIT = (
    f"no source has a split '{SPLIT}'; a pack with --val-share 0.05 makes one (mm data pack --help)"
)


class HeldOutBatches(NamedTuple):
    """Batches on the host and, by modality, what a target of them costs by chance and stands for.

    ``chance`` in nats a token, as the loss is; ``bytes_per_token`` raw bytes, only where the run
    has the tokenizer.
    """

    steps: Sequence[Sequence[Batch]]  # micro-batches of this rank, of every step
    carrying: Any  # the stream, where its documents go on in the next step; else None
    chance: Mapping[str, float]
    bytes_per_token: Mapping[str, float]


def held_out_batches(
    stage: StageState, vocabulary: Vocabulary | None, tokenizers: Callable[[], Mapping[str, Any]]
) -> HeldOutBatches | str:
    """The first batches of the data's split "val", or the reason why there are none.

    Through the transforms of the training data, drawn with a seed of their own. All ranks together
    have the same rows, however many there are. Call on all ranks.
    """
    stream = _open(stage, vocabulary)
    steps: list[list[Batch]] = []
    for part in (_pass_over, _as_far_as_all):
        made = stream if isinstance(stream, str) else part(stream, steps, stage)
        if on_any(isinstance(made, str), stage.env.device):
            return made if isinstance(made, str) else "another process cannot read it"
    assert not isinstance(stream, str)
    stream.close()
    chance, ratio = {}, {}
    if vocabulary is not None:
        micros = [batch for step in steps for batch in step]
        chance, ratio, some = _beside(micros, vocabulary, tokenizers(), stage.env.device)
        if not some and all("target_modality" in batch.labels for batch in micros):
            return f"the split '{SPLIT}' has no target after the transforms"
    carrying = stream if getattr(stream, "carried_rows", 0) else None
    ratio = {**ratio, **(getattr(stream, "bytes_per_token", None) or {})}
    return HeldOutBatches(steps, carrying, chance, ratio)


def held_out_data(data: Any) -> Any:
    """The config of a stage's data over its split "val"; None where no source has one."""
    return data.held_out(SPLIT) if hasattr(data, "held_out") else None


def _open(stage: StageState, vocabulary: Vocabulary | None) -> Any:
    """The stream of the split, or why there is none."""
    config = stage.config
    ranks = data_ranks(stage.env.sequence.size if stage.env.sequence else 1)
    try:
        data = held_out_data(config.data)
        if data is None:
            return NO_SPLIT
        return build(
            data,
            vocabulary=vocabulary,
            transform=stage.objective.transform,
            seed=SEED,
            rank=ranks.rank,
            world=ranks.world,
        )
    except UserError as error:
        return str(error)


def _pass_over(stream: Any, steps: list[list[Batch]], stage: StageState) -> str | None:
    """Read until the own rows have passed over the split; returns what went wrong."""
    try:
        while len(steps) < stage.config.held_out_batches and not (steps and stream.epoch >= 1):
            steps.append(list(stream.next()))
    except UserError as error:
        return str(error)
    return None


def _as_far_as_all(stream: Any, steps: list[list[Batch]], stage: StageState) -> str | None:
    """Read on until the rows of all ranks have; returns what went wrong. Call on all ranks."""
    wanted = most(len(steps), stage.env.device)
    try:
        while len(steps) < wanted:
            steps.append(list(stream.next()))
    except UserError as error:
        return str(error)
    return None


def _beside(
    micros: Sequence[Batch],
    vocabulary: Vocabulary,
    tokenizers: Mapping[str, Any],
    device: torch.device,
) -> tuple[dict[str, float], dict[str, float], bool]:
    """Chance and bytes per token of the modalities that have targets, over all ranks.

    And whether any has. Values have no chance: there is no number of them to guess from.

    The bytes of text are those of all its whole spans; of others a few are decoded, as the bytes of
    a code hardly vary.
    """
    names = vocabulary.modalities
    known = [m for m in names if m in tokenizers]
    seen = BytesPerToken(documents=len(micros) * 10_000)
    seen.observe(micros, vocabulary, {m: tokenizers[m] for m in known})
    rows = []
    for m in names:
        scored = sum((_targets(b, m, vocabulary) for b in micros), torch.zeros(4).double())
        spans, tokens, size = seen.totals.get(m, (0, 0, 0))
        rows.append(torch.cat([scored, torch.tensor([tokens - spans, size]).double()]))
    total = torch.stack(rows).to(device)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    chance, ratio = {}, {}
    for m, (weight, nats, targets, codes, decoded, size) in zip(names, total.tolist(), strict=True):
        if weight and not vocabulary.spec(m).continuous:
            chance[m] = nats / weight
        if targets and decoded and size:
            ratio[m] = size / decoded * codes / targets
    return chance, ratio, bool(total[:, 0].any())


def _targets(b: Batch, modality: str, vocabulary: Vocabulary) -> Tensor:
    """Of a host batch's targets of one modality: weight, nats by chance, number, codes among them.

    (4,) float64. Hidden codes, which predict themselves, are left out.
    """
    label = b.labels.get("target_modality")
    if label is None:
        return torch.zeros(4).double()
    span, spec = vocabulary.range(modality), vocabulary.spec(modality)
    ids, target, weight = b.ids[..., 0].numpy(), b.targets[..., 0].numpy(), b.weight.numpy()
    mine = (weight > 0) & (ids != MASK) & (label.numpy() == span.index)
    further = np.zeros(0)
    if CODES in b.places:
        mine &= target >= 0
        own = (weight > 0) & (label.numpy() == span.index)
        codes = (b.targets[..., 1:].numpy() >= 0).sum(-1) * own
        further = np.repeat(weight.flatten(), codes.flatten()).astype(np.float64)
        if len(further):
            spec = spec._replace(n_codebooks=1)
    at = np.arange(ids.shape[1])
    begin = np.maximum.accumulate(np.where(ids == span.begin, at, -1), axis=1)
    is_end = target[mine] == span.end
    place = (at - begin)[mine]
    nats = np.zeros(len(place)) if spec.continuous else nats_at(place, is_end, spec)
    counted = weight[mine].astype(np.float64)
    found = [counted.sum(), (counted * nats).sum(), len(is_end), (~is_end).sum()]
    more = further.sum(), (further * np.log(max(1, spec.vocab_size))).sum(), *[len(further)] * 2
    return torch.tensor(found, dtype=torch.float64) + torch.tensor(more, dtype=torch.float64)
