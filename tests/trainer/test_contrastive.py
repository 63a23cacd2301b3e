"""Contrast over micro-batches and ranks: the gradient is that of one loss over all pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mm.batch import Batch
from mm.data.batching.collate import to_batch
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.objectives.contrastive import info_nce
from mm.registry import NETWORKS, OBJECTIVES
from mm.specs import Segment, TokenSpec
from mm.trainer.env import TrainerEnv
from mm.vocabulary import extend_vocabulary

VOCABULARY = extend_vocabulary(
    [TokenSpec("text", 6), TokenSpec("image", 0, continuous=True, n_features=3)]
)
MODEL: dict[str, Any] = {
    "kind": "lm",
    "d_model": 16,
    "adapters": {"image": {"kind": "linear", "d_in": 3}},
    "backbone": {"kind": "stack", "depth": 1, "pattern": "attention", "block": {"kind": "prenorm"}},
    "heads": {"embedding": {"kind": "embedding", "d_out": 8, "pool": "mean"}},
}


def build() -> Any:
    model = NETWORKS.parse(MODEL).build(VOCABULARY).double()
    torch.manual_seed(0)
    init_weights(model)
    return model


def sample(r: int) -> list[Segment]:
    rng = np.random.default_rng(r)
    values = rng.normal(size=(2 + r % 3, 3))
    image = Segment("image", np.full(len(values), -1), values, role="condition")
    return [image, Segment("text", np.array([r % 4, 5][: 1 + r % 2]))]


def batch(rows: list[list[int]], lacking: int = -1) -> Batch:
    """Samples by number; ``lacking`` has no text, and in odd ones the text comes first."""
    made = [
        [sample(r)[: 1 if r == lacking else 2][:: -1 if r % 2 else 1] for r in row] for row in rows
    ]
    return to_batch(made, VOCABULARY, 40, 4)


def gradient(micros: list[Batch]) -> dict[str, torch.Tensor]:
    """Of the objective's terms, as the trainer sums them, over the ranks that there are."""
    model, objective = build(), OBJECTIVES.parse(
        {"kind": "contrastive", "pair": ["image", "text"]}
    ).build(VOCABULARY)  # fmt: skip
    env = TrainerEnv(0, torch.device("cpu"), "fp32")
    micros = [objective.corrupt(b, None, {}) for b in micros]
    total = torch.zeros((), dtype=torch.float64)
    for term in objective.terms(micros, {"model": model}, env):
        term.losses["contrastive"].backward()
        total += term.losses["contrastive"].detach().double()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if dist.is_initialized():
        for t in (total, *grads.values()):
            dist.all_reduce(t)
    return {"loss": total, **grads}


ALL = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def rank(number: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    found = gradient([batch(ALL[number], lacking=5)])
    if number == 0:
        torch.save(found, out)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_and_micro_batches_are_one_loss(tmp_path: Path) -> None:
    whole = gradient([batch(ALL[0], lacking=5), batch(ALL[1], lacking=5)])
    spawn(rank, args=(str(tmp_path / "store"), str(tmp_path / "found")), nprocs=2)
    for name, g in torch.load(tmp_path / "found").items():
        torch.testing.assert_close(g, whole[name], rtol=1e-6, atol=1e-9, msg=name)
    # Plain back-propagation through every vector at once.
    model = build()
    vectors, texts = [], []
    for r in (0, 1, 2, 3, 4, 6, 7):  # 5 has no text
        image, text = sample(r)
        pair = []
        for s in (image, text):
            b = to_batch([[[s._replace(role="condition")]]], VOCABULARY)
            # Each is read from where it stands in its sample.
            before = (text if r % 2 else None) if s is image else (None if r % 2 else image)
            start = 0 if before is None else len(before.ids) + 2
            f = b.layout.fields
            moved = replace(b.layout, fields=f._replace(position=f.position + start))
            last = torch.tensor([b.layout.shape[1] - 1])
            b = replace(b, layout=moved, places={"embedding": last})
            pair.append(model(b, loss=False).heads["embedding"].dist.mean[0])
        vectors.append(torch.stack(pair))
        texts.append(hash(tuple(text.ids.tolist())) % 1000003)
    every = torch.stack(vectors)
    loss = info_nce(every, torch.ones(7, dtype=torch.bool), torch.tensor(texts).double())
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), whole["loss"], rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-5, atol=1e-8, msg=name)


def test_equal_texts_are_right_answers_and_missing_ones_no_wrong_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 5)
    there = torch.tensor([True, True, True, False])
    same = info_nce(x, there, torch.tensor([1.0, 1.0, 2.0, 3.0]))
    logits = x[:3, 0] @ x[:3, 1].T
    want = 0.0
    for scores in (logits, logits.T):
        p = scores.log_softmax(1)
        want = want - 0.5 * (0.5 * (p[0, 0] + p[0, 1] + p[1, 0] + p[1, 1]) + p[2, 2])
    torch.testing.assert_close(same, want)
    twice = to_batch([[[*sample(0), sample(1)[0]]]], VOCABULARY)
    objective = OBJECTIVES.parse({"kind": "contrastive", "pair": ["image", "text"]})
    with pytest.raises(UserError, match="several parts of one of image and text"):
        objective.build(VOCABULARY).corrupt(twice, None, {})
    for pair, why in ((["image", "sound"], "has no 'sound'"), (["text", "text"], "with itself")):
        with pytest.raises(UserError, match=why):
            OBJECTIVES.parse({"kind": "contrastive", "pair": pair}).build(VOCABULARY)
