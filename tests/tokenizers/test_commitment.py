"""The commitment loss pulls the encoder to its codes: its gradient, by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mm.model.layer import init_weights
from mm.registry import QUANTIZERS


def built(kind: str, **settings: object):
    torch.manual_seed(0)
    module = QUANTIZERS.parse({"kind": kind, "codebook_size": 16, "d": 6} | settings).build()
    init_weights(module)
    return module


@pytest.mark.parametrize("normalize", ["none", "layer", "l2"])
def test_its_gradient_is_twice_the_error_through_the_normalisation(normalize: str) -> None:
    module = built("vq", normalize=normalize)
    z = torch.randn(5, 6, requires_grad=True)
    out = module(z)
    (grad,) = torch.autograd.grad(out.aux["commitment"].total, z)
    scales = {"none": lambda t: t, "layer": lambda t: F.layer_norm(t, (6,))}
    x = scales.get(normalize, lambda t: F.normalize(t, dim=-1))(z)
    towards = 2 * (x - module.decode(out.ids)).detach() / 6
    (expected,) = torch.autograd.grad(x, z, towards)
    torch.testing.assert_close(grad, expected)
    assert grad.abs().max() > 1e-2


@pytest.mark.parametrize("books", [1, 2])
def test_dropped_books_take_no_part_in_it(books: int) -> None:
    """With k of Q books in use it is that of a quantizer with k books."""
    many, few = built("rvq", n_codebooks=4), built("rvq", n_codebooks=books)
    for mine, theirs in zip(few.books, many.books, strict=False):
        mine.load_state_dict(theirs.state_dict())
    z = torch.randn(7, 6, requires_grad=True)
    a, b = (m(z, n_books=books).aux["commitment"] for m in (many, few))
    torch.testing.assert_close(a.mean(), b.mean())
    for left, right in zip(
        torch.autograd.grad(a.total, z), torch.autograd.grad(b.total, z), strict=True
    ):
        torch.testing.assert_close(left, right)
