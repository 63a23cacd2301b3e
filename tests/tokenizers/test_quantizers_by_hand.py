"""Quantizers of a few codes, every figure of which is worked out by hand."""

from __future__ import annotations

import torch

from mm.model.layer import init_weights
from mm.tokenizers.quantizers.factorized_rvq import (
    FactorizedResidualVectorQuantizer,
    FactorizedRvqConfig,
)
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


def test_books_of_the_second_chain_are_dropped_from_its_end() -> None:
    config = SplitRvqConfig(n_codebooks=3, codebook_size=2, d=2, d_code=2, zero_code=False)
    module = config.build()
    init_weights(module)
    for part in (module.first, module.rest):
        part.inner.weight.data = part.out.weight.data = torch.eye(2)
    books = [*module.first.chain.books, *module.rest.chain.books]
    for book, value in zip(books, (1, 2, 4), strict=True):
        book.codes.fill_(value)  # type: ignore[operator, union-attr]
    heard = [module(Z, n_books=n) for n in (1, 2, 3)]
    assert [out.z[0].tolist() for out in heard] == [[1, 1], [3, 3], [7, 7]]
    assert [(out.ids >= 0).sum(1).tolist() for out in heard] == [[1] * 3, [2] * 3, [3] * 3]


def test_a_chain_codes_in_a_width_of_its_own() -> None:
    """It reads the last two of three numbers, and writes what it made of them to the first two."""
    module = SplitRvqConfig(n_codebooks=2, codebook_size=2, d=3, d_code=2).build()
    init_weights(module)
    for part, times in ((module.first, 1), (module.rest, 100)):
        part.inner.weight.data.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        part.out.weight.data.copy_(times * torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        part.chain.books[0].codes.copy_(torch.eye(2))  # type: ignore[operator, union-attr]
    out = module.eval()(torch.tensor([[5.0, 3.0, 1.0], [-9.0, 0.0, 2.0]]))
    assert out.ids.tolist() == [[0, 0], [1, 1]]
    assert out.z.tolist() == [[101, 0, 0], [0, 101, 0]]


def by_angle() -> FactorizedResidualVectorQuantizer:
    """Two books of two codes of several lengths, in the width of the latent."""
    module = FactorizedRvqConfig(codebook_size=2, d=2, d_code=2).build()
    init_weights(module)
    codes = ([[3.0, 4.0], [1.0, 3.0]], [[1.0, 0.0], [0.0, 2.0]])
    for book, own in zip(module.books, codes, strict=True):
        book.inner.weight.data = book.out.weight.data = torch.eye(2)  # type: ignore[union-attr]
        book.codes.codes.copy_(torch.tensor(own))  # type: ignore[operator, union-attr]
        book.codes.updates.fill_(1)  # type: ignore[operator, union-attr]
    return module.train()


def test_books_choose_by_angle_and_code_what_is_left() -> None:
    """The second vector is nearer to the first code, but in line with the second."""
    module, z = by_angle(), torch.tensor([[6.0, 8.0], [2.0, 6.0]])
    out = module(z)
    assert out.ids.tolist() == [[0, 1], [1, 1]]
    assert out.z.tolist() == [[3, 6], [1, 5]]
    assert out.aux["usage"].total.tolist() == [[1, 1], [0, 2]]
    paid = {
        "both": out.aux["commitment"],  # of two books: (12.5 + 6.5) / 2 and (5 + 1) / 2
        "first": module(z, n_books=1).aux["commitment"],
        "valid": module(z, valid=torch.tensor([True, False])).aux["commitment"],
    }
    found = {name: (float(s.total.detach()), float(s.count)) for name, s in paid.items()}
    assert found == {"both": (12.5, 2), "first": (17.5, 2), "valid": (9.5, 1)}
    module.after_step({name: each.detach() for name, each in out.aux.items()})
    codes = module.code_vectors()
    assert codes[:2].tolist() == [[6, 8], [2, 6]]
    assert codes[3].tolist() == [2, 3.5], "the mean of what the first book left"
