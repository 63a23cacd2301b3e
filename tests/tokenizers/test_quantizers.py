"""Quantizers: the laws of the interface over the whole registry, and what each paper promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mm.batch import Sum
from mm.model.layer import init_weights
from mm.registry import QUANTIZERS
from mm.tokenizers.quantizers.base import Quantizer, perplexity, usage, usage_share
from mm.tokenizers.quantizers.fsq import FsqConfig
from mm.tokenizers.quantizers.lfq import LfqConfig
from mm.tokenizers.quantizers.vq import EmaCodebook, VqConfig, normalized

KINDS = list(QUANTIZERS)


def build(kind: str) -> Quantizer:
    torch.manual_seed(0)
    quantizer = QUANTIZERS.get(kind).smallest().build()
    init_weights(quantizer)
    return quantizer


def latents(quantizer: Quantizer, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, quantizer.d, generator=generator)


# ---- every quantizer -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_ids_in_range_and_decode_gives_what_forward_gave(kind: str) -> None:
    quantizer = build(kind).eval()
    z = latents(quantizer, 3, 5)
    out = quantizer(z)
    assert out.z.shape == z.shape and out.z.dtype == z.dtype
    assert out.ids.shape == (3, 5, quantizer.n_codebooks) and out.ids.dtype == torch.int64
    assert out.ids.min() >= 0 and out.ids.max() < quantizer.codebook_size
    torch.testing.assert_close(quantizer.decode(out.ids), out.z)


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_decodes_and_code_vectors_are_the_codes(kind: str) -> None:
    quantizer = build(kind)
    vectors = quantizer.code_vectors()
    K, Q = quantizer.codebook_size, quantizer.n_codebooks
    assert vectors.shape == (Q * K, quantizer.d) and vectors.isfinite().all()
    assert len(torch.unique(vectors[:K], dim=0)) == K
    ids = torch.arange(K)[:, None].expand(-1, Q)
    assert quantizer.decode(ids).shape == (K, quantizer.d)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_latents(kind: str) -> None:
    quantizer = build(kind)
    z = latents(quantizer, 64).requires_grad_()
    towards = latents(quantizer, 64, seed=1)
    (quantizer(z).z * towards).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()
    assert (z.grad != 0).any(-1).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mutates_nothing(kind: str) -> None:
    quantizer = build(kind).train()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(latents(quantizer, 40))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_parts_add_up_to_those_of_the_whole(kind: str) -> None:
    quantizer = build(kind).train()
    z = latents(quantizer, 60)
    whole, first, second = (quantizer(x).aux for x in (z, z[:23], z[23:]))
    assert set(whole) == set(first)
    for name in set(whole) - {"entropy"}:  # the entropy of a batch is no sum (see lfq.py)
        both = first[name] + second[name]
        torch.testing.assert_close(both.count, whole[name].count, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(both.mean(), whole[name].mean(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_enters_no_statistic(kind: str) -> None:
    quantizer = build(kind).train()
    z = latents(quantizer, 2, 10)
    valid = torch.arange(10) < torch.tensor([[10], [4]])
    noisy = torch.where(valid[..., None], z, 50.0)
    a, b = quantizer(z, valid=valid).aux, quantizer(noisy, valid=valid).aux
    assert a["usage"].total.sum(1).tolist() == [14.0] * quantizer.n_codebooks
    for name in a:
        torch.testing.assert_close(a[name].total, b[name].total)
        torch.testing.assert_close(a[name].count, b[name].count)


@pytest.mark.parametrize("kind", KINDS)
def test_bypass_is_not_quantised_but_still_counts(kind: str) -> None:
    quantizer = build(kind).train()
    z = latents(quantizer, 50)
    plain, bypassed = quantizer(z), quantizer(z, bypass=True)
    assert torch.equal(plain.ids, bypassed.ids) and set(plain.aux) == set(bypassed.aux)
    assert not torch.allclose(plain.z, bypassed.z)
    assert len(torch.unique(bypassed.z, dim=0)) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_ids_under_bf16_autocast_are_those_of_fp32(kind: str) -> None:
    quantizer = build(kind).eval()
    z = latents(quantizer, 200)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
    assert torch.equal(out.ids, quantizer(z).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip_gives_the_same_ids(kind: str) -> None:
    one, two = build(kind), QUANTIZERS.get(kind).smallest().build()
    one.after_step({k: v.detach() for k, v in one.train()(latents(one, 50)).aux.items()})
    init_weights(two)
    two.load_state_dict(one.state_dict())
    z = latents(one, 80, seed=3)
    assert torch.equal(one.eval()(z).ids, two.eval()(z).ids)


# ---- figures -------------------------------------------------------------------------------------


def test_usage_counts_by_book_and_mask() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [3, -1], [3, 0]])
    found = usage(ids, 4, torch.tensor([True, True, True, False]))
    assert found.total.tolist() == [[2, 0, 0, 1], [0, 1, 1, 0]]
    assert found.count.tolist() == [[3], [2]]


def test_share_and_perplexity_of_known_histograms() -> None:
    h = torch.tensor([[5.0, 5, 5, 5], [9, 0, 0, 0], [4, 4, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(usage_share(h), [1, 0.25, 0.5, 0])
    np.testing.assert_allclose(perplexity(h), [4, 1, 2, 1])


# ---- VQ ------------------------------------------------------------------------------------------


def clusters(n: int, step: int, k: int = 32, d: int = 8) -> torch.Tensor:
    centers = torch.randn(k, d, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(1000 + step)
    picked = centers[torch.randint(0, k, (n,), generator=generator)]
    return picked + 0.02 * torch.randn(n, d, generator=generator)


def update(quantizer: Quantizer, *parts: torch.Tensor) -> dict[str, Sum]:
    total: dict[str, Sum] = {}
    for part in parts:
        for name, each in quantizer(part).aux.items():
            total[name] = total[name] + each.detach() if name in total else each.detach()
    quantizer.after_step(total)
    return total


def test_vq_finds_clusters_and_keeps_its_codes_alive() -> None:
    quantizer = VqConfig(codebook_size=32, d=8).build()
    init_weights(quantizer)
    first = quantizer(clusters(800, 0)).aux["commitment"].mean()
    for step in range(80):
        total = update(quantizer, clusters(800, step))
    assert total["commitment"].mean() < 0.1 * first
    assert usage_share(total["usage"].total)[0] >= 0.9
    assert perplexity(total["usage"].total)[0] > 24


def test_vq_update_does_not_depend_on_how_the_batch_was_cut() -> None:
    one, many = (VqConfig(codebook_size=32, d=8).build() for _ in range(2))
    for quantizer in (one, many):
        init_weights(quantizer)
    for step in range(15):
        x = clusters(400, step)
        update(one, x)
        update(many, *x.split([13, 187, 200]))
        torch.testing.assert_close(one.book.codes, many.book.codes, rtol=1e-3, atol=1e-3)


def test_candidates_are_vectors_of_the_batch_not_their_mean() -> None:
    book = EmaCodebook(64, 8)
    init_weights(book)
    x = normalized(torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)), "layer")
    parts = [book.statistics(p, book.nearest(p))["candidates"] for p in x.split(100)]
    drawn = sum(parts[1:], parts[0]).mean()
    distance = torch.cdist(drawn, x).min(1).values
    assert distance.median() < 0.3  # the typical distance of two vectors is 4
    assert (drawn.norm(dim=1) > 2).float().mean() > 0.8  # the mean of all has norm 0, a vector 2.8
    nearest = torch.cdist(drawn, x).argmin(1)
    assert len(torch.unique(nearest)) > 55


def test_a_dead_code_restarts_and_live_ones_stay() -> None:
    quantizer = VqConfig(codebook_size=8, d=4, kmeans_steps=0, decay=0.5).build()
    init_weights(quantizer)
    for step in range(20):
        update(quantizer, clusters(400, step, k=8, d=4))
    book = quantizer.book
    book.codes[3] = 100.0
    alive = [i for i in range(8) if i != 3]
    before = book.codes.clone()
    for step in range(20, 24):
        update(quantizer, clusters(400, step, k=8, d=4))
    assert book.codes[3].abs().max() < 5
    assert (book.codes[alive] - before[alive]).abs().median() < 0.1


def test_restarts_can_be_switched_off() -> None:
    quantizer = VqConfig(codebook_size=8, d=4, kmeans_steps=0, decay=0.5, restart_below=0.0).build()
    init_weights(quantizer)
    update(quantizer, clusters(400, 0, k=8, d=4))
    quantizer.book.codes[3] = 100.0
    quantizer.book.updates.fill_(50)
    for step in range(10):
        update(quantizer, clusters(400, step, k=8, d=4))
    assert quantizer.book.codes[3].min() > 50


def test_ema_is_the_moving_average_of_sums_over_that_of_counts() -> None:
    """Against the two-accumulator form of arXiv:1711.00937, appendix A.1."""
    decay = 0.9
    book = EmaCodebook(4, 3, decay=decay, kmeans_steps=0, restart_below=0.0).double()
    init_weights(book)
    book.updates.fill_(1)
    n, m = book.size.clone(), book.codes * book.size[:, None]
    for step in range(5):
        x = torch.randn(40, 3, generator=torch.Generator().manual_seed(step)).double()
        ids = book.nearest(x)
        hot = F.one_hot(ids, 4).double()
        n = decay * n + (1 - decay) * hot.mean(0)
        m = decay * m + (1 - decay) * hot.t() @ x / len(x)
        book.update(book.statistics(x, ids))
    torch.testing.assert_close(book.codes, m / n[:, None], rtol=1e-5, atol=1e-6)


def test_l2_codes_stay_on_the_sphere() -> None:
    quantizer = VqConfig(codebook_size=16, d=4, normalize="l2").build()
    init_weights(quantizer)
    for step in range(15):
        update(quantizer, clusters(200, step, d=4))
    torch.testing.assert_close(quantizer.book.codes.norm(dim=1), torch.ones(16))


def test_codebook_stays_fp32_when_a_module_is_converted() -> None:
    quantizer = VqConfig(codebook_size=16, d=4).build()
    init_weights(quantizer)
    before = quantizer.book.codes.clone()
    quantizer.bfloat16()
    assert quantizer.book.codes.dtype == torch.float32 and torch.equal(quantizer.book.codes, before)
    out = quantizer(torch.randn(5, 4, dtype=torch.bfloat16))
    assert out.z.dtype == torch.bfloat16
    assert quantizer.double().book.codes.dtype == torch.float64


def test_an_empty_step_changes_nothing() -> None:
    quantizer = VqConfig(codebook_size=8, d=4).build()
    init_weights(quantizer)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    z = torch.randn(3, 4)
    stats = quantizer(z, valid=torch.zeros(3, dtype=torch.bool)).aux
    quantizer.after_step({k: v.detach() for k, v in stats.items()})
    quantizer.after_step({})
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


def test_evaluation_emits_no_codebook_statistics() -> None:
    quantizer = build("vq").eval()
    assert set(quantizer(latents(quantizer, 4)).aux) == {"usage", "commitment"}


# ---- FSQ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(2,), (3,), (4, 4, 4), (8, 5, 5, 5), (7, 2, 6)])
def test_fsq_has_exactly_its_levels_and_every_code_maps_to_itself(levels: tuple[int, ...]) -> None:
    quantizer = FsqConfig(levels=levels).build()
    init_weights(quantizer)
    wide = torch.linspace(-9, 9, 4001)[:, None].expand(-1, len(levels))
    values = quantizer(wide).z
    assert [len(torch.unique(values[:, i])) for i in range(len(levels))] == list(levels)
    assert values.abs().max() <= 1
    codes = quantizer.code_vectors()
    back = torch.atanh(
        (codes * (quantizer.levels // 2) + torch.where(quantizer.levels % 2 == 0, 0.5, 0.0))
        / ((quantizer.levels - 1) * 1.001 / 2)
    ) - torch.atanh(
        torch.where(quantizer.levels % 2 == 0, 0.5, 0.0) / ((quantizer.levels - 1) * 1.001 / 2)
    )
    assert torch.equal(quantizer(back).ids[:, 0], torch.arange(quantizer.codebook_size))


def test_fsq_gradient_is_that_of_the_bound() -> None:
    quantizer = FsqConfig(levels=(5,)).build()
    init_weights(quantizer)
    z = torch.tensor([[0.3], [-1.2]], requires_grad=True)
    quantizer(z).z.sum().backward()
    expected = (1 - torch.tanh(z.detach()) ** 2) * (4 * 1.001 / 2) / 2
    torch.testing.assert_close(z.grad, expected)


# ---- LFQ -----------------------------------------------------------------------------------------


def test_lfq_ids_are_sign_bits() -> None:
    quantizer = LfqConfig(bits=3).build()
    init_weights(quantizer)
    z = torch.tensor([[-1.0, 2.0, 0.5], [0.1, -3.0, -1.0]])
    out = quantizer(z)
    assert out.ids[:, 0].tolist() == [6, 1]
    assert out.z.tolist() == [[-1, 1, 1], [1, -1, -1]]


@pytest.mark.parametrize("group", [2, 4])
def test_lfq_penalty_equals_the_brute_force_over_all_codes(group: int) -> None:
    quantizer = LfqConfig(bits=4, group=group, temperature=0.7, diversity=0.9).build()
    init_weights(quantizer)
    z = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for some in z.split(group, dim=1):
        codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=group)))
        p = F.softmax(-(some[:, None] - codes).square().sum(-1) / 0.7, dim=-1)
        each = -(p * p.log()).sum(-1).mean()
        mean = p.mean(0)
        expected = expected + each - 0.9 * -(mean * mean.log()).sum()
    torch.testing.assert_close(quantizer(z).aux["entropy"].mean(), torch.as_tensor(expected))


def test_lfq_penalty_brings_unused_codes_into_use() -> None:
    quantizer = LfqConfig(bits=4).build()
    init_weights(quantizer)
    z = (torch.randn(128, 4, generator=torch.Generator().manual_seed(0)) * 0.2 + 1).requires_grad_()
    before = usage_share(quantizer(z).aux["usage"].total)[0]
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        quantizer(z).aux["entropy"].mean().backward()
        optimizer.step()
    assert before < 0.5 and usage_share(quantizer(z).aux["usage"].total)[0] > 0.9
