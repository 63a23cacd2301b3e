"""Residual vector quantisation.

More books never hurt, a prefix of the books decodes, codebooks follow the data.
"""

from __future__ import annotations

import pytest
import torch

from mm.batch import Sum
from mm.model.layer import init_weights
from mm.tokenizers.quantizers.base import usage_share
from mm.tokenizers.quantizers.rvq import ResidualVectorQuantizer, RvqConfig


def rvq(**settings) -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    module = RvqConfig(**({"n_codebooks": 3, "codebook_size": 32, "d": 8} | settings)).build()
    init_weights(module)
    return module


def clusters(n: int, d: int = 8, k: int = 40, seed: int = 0) -> torch.Tensor:
    """Points around k centres, (n, d)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=torch.Generator().manual_seed(99))
    return centres[torch.randint(k, (n,), generator=g)] + 0.2 * torch.randn(n, d, generator=g)


def fit(module: ResidualVectorQuantizer, steps: int = 40, **settings) -> ResidualVectorQuantizer:
    module.train()
    for step in range(steps):
        module.after_step(module(clusters(256, seed=step), **settings).aux)
    return module


@pytest.mark.parametrize("trained", [False, True])
def test_error_never_grows_with_another_book(trained):
    module = fit(rvq()) if trained else rvq()
    x = torch.nn.functional.layer_norm(clusters(500, seed=777), (8,))
    ids = module(x).ids
    errors = [
        (module.decode(ids[:, :k]) - x).square().sum(-1) for k in range(4)
    ]  # k = 0: the zero vector
    for fewer, more in zip(errors[1:], errors[2:], strict=False):
        assert (more <= fewer + 1e-5).all()  # for every single vector, also of an untrained book
    if trained:
        assert errors[3].mean() < 0.5 * errors[1].mean() < 0.5 * errors[0].mean()


def test_decode_of_the_first_books_is_what_forward_gave():
    module = fit(rvq())
    x = clusters(50, seed=5).view(5, 10, 8)
    for k in (1, 2, 3):
        out = module(x, n_books=k)
        assert (
            out.ids.shape == (5, 10, 3)
            and (out.ids[..., k:] == -1).all()
            and (out.ids[..., :k] >= 0).all()
        )
        torch.testing.assert_close(module.decode(out.ids), out.z)
        torch.testing.assert_close(module.decode(out.ids[..., :k]), out.z)
        assert torch.equal(out.ids[..., :k], module(x).ids[..., :k])


def test_code_zero_of_every_later_book_is_the_zero_vector():
    for module in (rvq(), fit(rvq(), steps=3)):
        first, *later = module.books
        assert first.codes[0].any()
        for book in later:
            assert not book.codes[0].any() and book.codes[1:].any(1).all()
        ids = torch.tensor([[3, 0, 0], [3, -1, -1]])
        torch.testing.assert_close(module.decode(ids), module.decode(ids[:, :1]))


def test_kmeans_start_fills_every_level_and_dead_codes_come_back():
    module = fit(rvq(), steps=30)
    counts = sum(module(clusters(2000, seed=s)).aux["usage"].total for s in (1, 2))
    assert (usage_share(counts) >= 0.9).all()
    # all codes of every level far from the data: only restarts can bring them back
    for book in module.books:
        book.codes[1:] = 50 * torch.randn(31, 8)
        book.size.fill_(1 / 32)
    counts = module(clusters(2000, seed=1)).aux["usage"].total
    assert (usage_share(counts) < 0.2).all()
    for step in range(400):
        module.after_step(module(clusters(256, seed=step)).aux)
    counts = module(clusters(4000, seed=1)).aux["usage"].total
    assert (usage_share(counts) >= 0.8).all()


def test_forward_changes_nothing_and_micro_batches_add_up():
    whole, halves = rvq().train(), rvq().train()
    for step in range(15):
        x = clusters(128, seed=step)
        before = {k: v.clone() for k, v in whole.state_dict().items()}
        aux = whole(x).aux
        assert all(torch.equal(v, before[k]) for k, v in whole.state_dict().items())
        first, second = halves(x[:50]).aux, halves(x[50:]).aux
        assert first.keys() == second.keys() == aux.keys()
        whole.after_step(aux)
        halves.after_step({k: first[k] + second[k] for k in first})
        for a, b in zip(whole.books, halves.books, strict=True):
            torch.testing.assert_close(
                a.codes, b.codes, rtol=0, atol=5e-3
            )  # candidates are drawn with u**-5
        halves.load_state_dict(
            whole.state_dict()
        )  # a near-tie that rounds the other way must not grow over steps


def test_names_of_statistics_do_not_depend_on_the_books_in_use():
    module = rvq().train()
    x = clusters(20)
    assert (
        module(x, n_books=1).aux.keys() == module(x).aux.keys() == module(x, bypass=True).aux.keys()
    )


def test_gradient_passes_straight_through_and_commitment_pulls_to_the_codes():
    module = rvq(normalize="none")
    x = clusters(16).requires_grad_()
    out = module(x)
    (grad,) = torch.autograd.grad(out.z.sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, torch.ones_like(x))
    # commitment: each residual to its code, codes held fixed. d/dx of the sum over levels, mean
    # over d and books
    (grad,) = torch.autograd.grad(out.aux["commitment"].total, x)
    residuals = sum(x.detach() - module.decode(out.ids[:, :k]) for k in (1, 2, 3))
    torch.testing.assert_close(grad, residuals * 2 / 8 / 3)


def test_bypass_returns_the_latents_but_still_measures():
    module = rvq().train()
    x = clusters(30)
    out = module(x, bypass=True)
    torch.testing.assert_close(out.z, torch.nn.functional.layer_norm(x, (8,)))
    assert torch.equal(out.ids, module(x).ids)
    assert float(out.aux["usage"].count.sum()) == 90


def test_padding_enters_no_statistic():
    module = rvq().train()
    x = clusters(40).view(4, 10, 8)
    valid = torch.arange(10) < torch.tensor([10, 3, 0, 7])[:, None]
    masked = module(x, valid=valid).aux
    alone = module(x[valid]).aux
    wild = module(torch.where(valid[..., None], x, 1e3 * torch.randn(4, 10, 8)), valid=valid).aux
    for name, value in alone.items():
        for other in (masked[name], wild[name]):
            torch.testing.assert_close(other.total, value.total, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(other.count, value.count, rtol=1e-4, atol=1e-3)


def test_bf16_input_is_searched_in_fp32():
    module = fit(rvq())
    x = clusters(64, seed=3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.z.dtype == torch.bfloat16
    assert torch.equal(out.ids, module(x.float()).ids)


def test_code_vectors_are_the_codes_book_by_book():
    module = fit(rvq())
    vectors = module.code_vectors()
    assert vectors.shape == (96, 8)
    ids = torch.tensor([[4, 7, 9]])
    torch.testing.assert_close(
        module.decode(ids)[0], vectors[4] + vectors[32 + 7] + vectors[64 + 9]
    )


def test_update_without_any_vector_keeps_the_codes():
    module = fit(rvq(), steps=3)
    before = [book.codes.clone() for book in module.books]
    aux = module(torch.randn(4, 8), valid=torch.zeros(4, dtype=torch.bool)).aux
    module.after_step({k: Sum(v.total.detach(), v.count) for k, v in aux.items()})
    assert all(torch.equal(a, b.codes) for a, b in zip(before, module.books, strict=True))
