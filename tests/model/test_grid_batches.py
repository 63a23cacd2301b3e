"""Grids of image codes from segments to mixers and positions, in training and in decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mm.batch import Batch
from mm.config import validate
from mm.data.batching.collate import axes_of, grids_of, to_batch
from mm.decoders.generate import generate_tokens
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.model.model import LmConfig, Model
from mm.specs import Segment, TokenSpec
from mm.vocabulary import Vocabulary

VOCABULARY = (
    Vocabulary().add(TokenSpec("text", 11)).add(TokenSpec("image", 7, grid=(3, 4), fingerprint="i"))
)
NO_GRID = Vocabulary().add(TokenSpec("text", 11)).add(TokenSpec("image", 7, fingerprint="i"))


def make(mixer: dict[str, Any], mask: str = "causal") -> Model:
    backbone = {"kind": "stack", "pattern": "mine", "depth": 2, "mixers": {"mine": mixer}}
    raw = {"d_model": 16, "backbone": backbone, "mask": mask}
    torch.manual_seed(0)
    model = validate(LmConfig, raw, "test").build(VOCABULARY)
    init_weights(model)
    return model


def batch(vocabulary: Vocabulary = VOCABULARY) -> Batch:
    """Images after their captions, the second row of two documents; one text alone."""
    rng = np.random.default_rng(0)
    text = lambda n: Segment("text", rng.integers(0, 11, n), role="condition")
    image = lambda: Segment("image", rng.integers(0, 7, 12))
    rows = [[[text(3), image()]], [[image()], [text(5)]]]
    return to_batch(rows, vocabulary, seq_len=24)


def test_a_batch_knows_rows_and_columns_of_images_and_gives_text_its_time() -> None:
    b = batch()
    assert b.layout.grids[3, 4].tolist() == [[*range(6, 18)], [*range(25, 37)]]
    position = b.layout.fields.position
    assert position.shape == (2, 24, 3)
    assert position[0, 6:18, 0].tolist() == [*range(6, 18)]
    assert (position[0, 6:18, 1] - 6).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (position[0, 6:18, 2] - 6).tolist() == [0, 1, 2, 3] * 3
    time = position[..., :1].expand(-1, -1, 3)
    assert torch.equal(position[0, :6], time[0, :6]) and torch.equal(position[0, 18:], time[0, 18:])
    assert axes_of(VOCABULARY) == 3 and axes_of(NO_GRID) == 1
    alone = to_batch([[[Segment("text", np.arange(5))]]], VOCABULARY)
    assert alone.layout.fields.position.shape[-1] == 3 and not alone.layout.grids
    assert not grids_of(b.ids[0, :20, 0].numpy(), NO_GRID)
    (part,) = grids_of(b.ids[0, :10, 0].numpy(), VOCABULARY)
    assert (part.start, part.length) == (6, 4)


MIXERS: dict[str, tuple[dict[str, Any], str]] = {
    "rows and columns": (
        {"kind": "attention", "heads": 2, "head_dim": 12,
         "position": {"kind": "rope_axes", "axes": [0, 1, 2]}}, "causal",
    ),
    "hierarchy": (
        {"kind": "attention", "heads": 2, "position": {"kind": "rope_axes", "axes": [2, 1]}},
        "causal",
    ),
    "irpe": ({"kind": "attention", "heads": 2, "position": "irpe"}, "causal"),
    "plstm": ({"kind": "plstm", "heads": 2}, "full"),
    "peg": ({"kind": "peg"}, "full"),
    "cross-scan": (
        {"kind": "scan_order", "inner": {"kind": "gated_scan"}, "orders": ["row", "column"],
         "reverse": [True, False]}, "full",
    ),
    "hilbert": (
        {"kind": "scan_order", "inner": {"kind": "gated_scan"}, "orders": ["hilbert"]}, "full",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mixer,mask", MIXERS.values(), ids=MIXERS)
def test_training_steps_on_real_batches_use_the_grid(mixer: dict[str, Any], mask: str) -> None:
    model, b, losses = make(mixer, mask), batch(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        nll = model(b).heads["tokens"].nll
        assert nll is not None
        loss = nll.mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        blind = replace(b, layout=batch(NO_GRID).layout)
        moved = (model(b).hidden - model(blind).hidden).abs().amax(-1) > 1e-6
    assert moved[0, 10:18].any() and moved[1, 5:13].any()
    text = slice(0, 6) if mask == "causal" else slice(0, 0)
    assert not moved[0, text].any(), "text before an image reads as if there were no grid"


def test_orders_that_show_the_future_are_refused_under_a_causal_mask() -> None:
    model = make(MIXERS["hilbert"][0])
    with pytest.raises(UserError, match="hilbert shows cells of a grid their future"):
        model(batch())


@pytest.mark.parametrize("name", ["rows and columns", "irpe"])
@pytest.mark.parametrize("have", [0, 5])
def test_generated_images_have_the_places_of_trained_ones(name: str, have: int) -> None:
    """Decoded greedily token by token, the image is what the model predicts when it reads it."""
    model = make(MIXERS[name][0]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    caption = Segment("text", np.arange(3), role="condition")
    begun = [Segment("image", np.arange(have) % 7)] if have else []
    (ids,) = generate_tokens(model, VOCABULARY, [[caption, *begun]], "image", temperature=0.0)
    assert len(ids) == 12
    whole = to_batch([[[caption, Segment("image", ids)]]], VOCABULARY)
    r = VOCABULARY.range("image")
    with torch.no_grad():
        dist = model(whole, heads=("tokens",), loss=False).heads["tokens"].dist
        blind = replace(
            whole, layout=to_batch([[[caption, Segment("image", ids)]]], NO_GRID).layout
        )
        other = model(blind, heads=("tokens",), loss=False).heads["tokens"].dist
    assert dist is not None and dist.logits is not None and other is not None
    codes = slice(have, 12)  # the places that predict codes; the last one predicts the end
    got = dist.logits[:, r.first : r.stop].argmax(-1)[codes]
    assert got.tolist() == ids[have:].tolist()
    assert (dist.logits - other.logits)[codes].abs().max() > 1e-3
