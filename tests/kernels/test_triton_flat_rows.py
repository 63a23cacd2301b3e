"""Whole mixers on Triton kernels, interpreted: rows of many documents against documents apart.

As a GPU runs them: the row goes to the kernels whole, with the borders of its documents.
"""

from __future__ import annotations

import pytest
import torch
from laws import D, apply
from torch import Tensor

pytest.importorskip("triton")

from triton_oracle import interpreted

from mm.kernels.attention import attention
from mm.layout import Doc, Layout
from mm.model import length_buckets
from mm.model.backbones.stack import StackConfig
from mm.model.layer import Layer, init_weights

# Documents that begin and end inside chunks of 64, at their borders, and longer than one.
LENGTHS = (3, 1, 60, 64, 70, 1)
LAYOUT = Layout.from_rows([[Doc(n) for n in LENGTHS]], sum(LENGTHS) + 5)


def _run(layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    """Outputs at tokens, and the gradients of the input and of every parameter."""
    torch.manual_seed(3)
    x = torch.randn(*LAYOUT.shape, D, dtype=torch.float64).to(dtype).requires_grad_()
    y = apply(layer, x, LAYOUT).y * (LAYOUT.fields.document > 0)[..., None]
    weight = torch.randn(y.shape, dtype=torch.float64)
    given = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad((y * weight).sum(), given, allow_unused=True)
    return [
        y,
        *(torch.zeros_like(p) if g is None else g for p, g in zip(given, grads, strict=True)),
    ]


WORDS = [
    "attention",
    "fox_attention",
    "retnet",
    "mamba2",
    "gla",
    "rwkv6",
    "deltanet",
    "gated_deltanet",
    "mamba",
]


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_a_row_of_documents_on_triton(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = StackConfig(pattern=word).mixer(word).build(D)
    torch.manual_seed(7)
    init_weights(layer)
    monkeypatch.setattr(length_buckets, "FLAT", True)
    with interpreted(), attention.using("triton"):  # few keys: SDPA would take them
        ours = _run(layer, torch.float32)
    monkeypatch.setattr(length_buckets, "FLAT", False)
    exact = _run(layer.double(), torch.float64)
    for x, y in zip(ours, exact, strict=True):
        error = (x.double() - y).square().mean().sqrt() / (y.square().mean().sqrt() + 1e-12)
        assert error < 2e-5
