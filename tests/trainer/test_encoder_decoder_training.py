"""What was never mixed: experts, Mamba-2 and cross-attention in an encoder-decoder, in the loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trainer_toys as toys
from trainer_runs import losses, make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.data.batching.collate import to_batch
from mm.decoders.generate import generate_tokens
from mm.model.model import Model
from mm.registry import NETWORKS
from mm.run import Run
from mm.specs import Segment
from mm.trainer.loop import train

MODEL = {
    "kind": "lm",
    "d_model": 16,
    "backbone": {
        "kind": "encoder_decoder",
        "encoder": {
            "pattern": "attention bidirectional",
            "mixers": {
                "attention": {"heads": 2},
                "bidirectional": {"inner": {"kind": "s4d", "states": 3}},
            },
            "ffn": {"kind": "moe", "experts": 4, "hidden": 8, "shared": 1},
        },
        "decoder": {
            "pattern": "mamba2 cross_attention",
            "mixers": {"mamba2": {"heads": 2}, "cross_attention": {"heads": 2, "kv_heads": 1}},
            "ffn": {"kind": "moe", "experts": 4, "hidden": 8},
            "ffns": {"mamba2": None},
            "blocks": {"cross_attention": {"kind": "gated"}},
        },
        "recompute": "selective",
    },
}


def mixed_run(out: Path, name: str, **data: object) -> Run:
    run = make_run(out, name, data=data)
    return run.model_copy(update={"model": NETWORKS.parse(MODEL)})


def test_it_trains_resumes_bit_by_bit_and_generates(tmp_path: Path) -> None:
    whole, halves = mixed_run(tmp_path, "whole"), mixed_run(tmp_path, "halves", signal_at=2)
    train(whole)
    with pytest.raises(SystemExit):
        train(halves)
    assert train(halves)["resumed_from"] == 3
    assert losses(whole) == losses(halves)
    a, b = (toys.load_toy(run.folder) for run in (whole, halves))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    gates = [name for name in a if "gates" in name]
    assert len(gates) == 2 and all(a[name].abs().item() > 0 for name in gates), "they have opened"

    model, vocabulary = Model.from_pretrained(whole.folder), toys.vocabulary()
    picture = Segment("image", np.arange(5), role="condition")
    (made,) = generate_tokens(model, vocabulary, [[picture]], "text", temperature=0, max_tokens=6)
    batch = to_batch([[[picture, Segment("text", made)]]], vocabulary)
    with torch.no_grad():
        logits = model(batch, loss=False).heads["tokens"].dist.logits
    first = vocabulary.range("text").first
    assert (
        len(made) and logits[: len(made), first : first + 20].argmax(-1).tolist() == made.tolist()
    )
