"""Quantizers of a few codes, every figure of which is worked out by hand."""

from __future__ import annotations

import torch

from mm.model.layer import init_weights
from mm.tokenizers.quantizers.split_rvq import SplitResidualVectorQuantizer, SplitRvqConfig

Z = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])


def two_chains() -> SplitResidualVectorQuantizer:
    """One book of two codes each, in the width of the latent, as after the first update."""
    module = SplitRvqConfig(n_codebooks=2, codebook_size=2, d=2, d_code=2).build()
    init_weights(module)
    codes = ([[0.0, 0.0], [10.0, 10.0]], [[0.0, 0.0], [4.0, 0.0]])
    for part, own in zip((module.first, module.rest), codes, strict=True):
        part.inner.weight.data = part.out.weight.data = torch.eye(2)
        part.chain.books[0].codes.copy_(torch.tensor(own))  # type: ignore[operator, union-attr]
        part.chain.books[0].updates.fill_(1)  # type: ignore[operator, union-attr]
    return module.train()


def test_two_chains_code_the_latent_and_each_learns_from_its_own_choice() -> None:
    module = two_chains()
    out = module(Z)
    assert out.ids.tolist() == [[0, 0], [0, 1], [1, 1]]
    assert out.z.tolist() == [[0, 0], [4, 0], [14, 10]]
    sums = {f"{chain}/0/{name}" for chain in ("first", "rest") for name in ("ema", "candidates")}
    assert set(out.aux) == {"usage", "commitment", *sums}
    assert out.aux["usage"].total.tolist() == [[2, 1], [1, 2]]
    # squares by width: 0.5 + 4.5 + 1 of the first, 0.5 + 0.5 + 53 of the rest
    assert (
        float(out.aux["commitment"].total.detach()) == 60
        and float(out.aux["commitment"].count) == 3
    )
    module.after_step({name: each.detach() for name, each in out.aux.items()})
    # an update of the start: codes are the means of what chose them
    assert module.code_vectors().tolist() == [[2, 0], [9, 9], [1, 0], [6, 4.5]]


def test_a_chain_that_is_dropped_is_neither_heard_nor_paid_for() -> None:
    module = two_chains()
    out = module(Z, n_books=1)
    assert out.ids.tolist() == [[0, -1], [0, -1], [1, -1]]
    assert out.z.tolist() == [[0, 0], [0, 0], [10, 10]]
    assert float(out.aux["commitment"].total.detach()) == 6
    torch.testing.assert_close(module.decode(out.ids), out.z)
