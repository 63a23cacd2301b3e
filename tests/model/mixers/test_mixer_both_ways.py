"""Mixers of whole documents against dense forms, and how they refuse what they cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import TOL, VOCABULARY, D, alone, documents
from torch import Tensor

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal, Full
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.encoder_only.fnet import dft
from mm.model.mixers.encoder_only.nystromformer import pseudo_inverse
from mm.model.mixers.linear_attention.ecoformer import EcoFormer, hash_loss, signs
from mm.registry import MIXERS, NETWORKS


def build(kind: str, **settings: Any) -> Any:
    torch.manual_seed(4)
    layer = MIXERS.get(kind)(**settings).build(D)
    init_weights(layer)
    return layer.double()


def projected(layer: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values `(H, T, K)`."""
    return list((x @ layer.qkv.weight.T).view(len(x), 3, layer.heads, -1).permute(1, 2, 0, 3))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def finished(layer: Any, y_HTK: Tensor) -> Tensor:
    return y_HTK.transpose(0, 1).flatten(1) @ layer.out.weight.T


# ---- FNet ----


def test_fnet_is_two_dft_matrices_and_has_no_parameters() -> None:
    layer = build("fnet")
    assert not list(layer.parameters())
    wide = dft(torch.tensor([D]), D, torch.float64)
    for T in (1, 3, 7, 64):
        (x,) = documents(T)
        (c, s), (cd, sd) = dft(torch.tensor([T]), T, torch.float64), wide
        expected = c[0] @ x @ cd[0] - s[0] @ x @ sd[0]
        torch.testing.assert_close(alone(layer, x), expected, rtol=1e-9, atol=1e-9)


def test_a_unitary_fnet_keeps_the_length_of_even_parts() -> None:
    """Re(F x) keeps the part of x that is the same mirrored, and drops the other."""
    (x,) = documents(9)
    mirrored = x.flip(0, 1).roll((1, 1), (0, 1))
    y = alone(build("fnet", unitary=True), x)
    torch.testing.assert_close(y.norm(), ((x + mirrored) / 2).norm())


# ---- Nystroem ----


def test_with_a_landmark_a_place_it_is_attention() -> None:
    layer, (x,) = (
        build("nystromformer", heads=2, landmarks=12, iterations=30, conv_size=0),
        documents(9),
    )
    expected = finished(layer, attention(*projected(layer, x)))
    torch.testing.assert_close(alone(layer, x), expected, rtol=1e-3, atol=1e-3)


def test_nystroem_is_the_papers_product_of_three() -> None:
    layer, (x,) = (
        build("nystromformer", heads=2, landmarks=4, iterations=30, conv_size=5),
        documents(12),
    )
    q, k, v = projected(layer, x)
    q_mark, k_mark = (t.unflatten(1, (4, 3)).mean(2) for t in (q, k))
    scale = q.shape[-1] ** -0.5
    soft = lambda a, b: (a @ b.mT * scale).softmax(-1)
    middle = torch.linalg.pinv(soft(q_mark, k_mark))
    y = soft(q, k_mark) @ middle @ soft(q_mark, k) @ v
    padded = torch.nn.functional.pad(v, (0, 0, 2, 2))
    skip = sum(layer.filter[:, j, None, None] * padded[:, j : j + 12] for j in range(5))
    torch.testing.assert_close(alone(layer, x), finished(layer, y + skip), rtol=1e-5, atol=1e-5)


def test_the_iteration_is_the_pseudo_inverse_and_leaves_zeros() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 5, 5, dtype=torch.float64, generator=g).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(a, 40), torch.linalg.pinv(a), rtol=1e-5, atol=1e-5)
    wider = torch.nn.functional.pad(a, (0, 2, 0, 2))
    torch.testing.assert_close(
        pseudo_inverse(wider, 6), torch.nn.functional.pad(pseudo_inverse(a, 6), (0, 2, 0, 2))
    )


# ---- Linformer ----


@pytest.mark.parametrize("share", ["none", "heads", "key_value"])
def test_linformer_with_the_identity_for_mixtures_is_attention(share: str) -> None:
    layer, (x,) = build("linformer", heads=2, mixtures=9, max_len=9, share=share), documents(9)
    assert len(layer.mixtures) == {"none": 4, "heads": 2, "key_value": 1}[share]
    mixed = alone(layer, x)
    with torch.no_grad():
        layer.mixtures.copy_(torch.eye(9).expand_as(layer.mixtures))
    expected = finished(layer, attention(*projected(layer, x)))
    torch.testing.assert_close(alone(layer, x), expected, **TOL)
    assert (mixed - expected).abs().max() > 1e-3


# ---- what they refuse ----


@pytest.mark.parametrize("kind", ["fnet", "linformer", "nystromformer"])
def test_a_causal_model_refuses_them_by_name(kind: str) -> None:
    layer = build(kind)
    with pytest.raises(UserError, match=f"{kind} cannot run under a causal mask.*mask: full"):
        layer(torch.zeros(1, 3, D).double(), Ctx(Layout.plain(1, 3), Causal()))
    with pytest.raises(UserError, match=f"^{kind} mixes both ways and has no State"):
        layer.initial_state(1, 8)
    base = NETWORKS.get("lm").smallest().model_dump()
    base["backbone"] = {"kind": "stack", "pattern": kind}
    ids = torch.randint(VOCABULARY.size, (1, 6))
    model = NETWORKS.parse({**base, "mask": "full"}).build(VOCABULARY)
    init_weights(model)
    assert model(Batch.of_ids(ids), loss=False).hidden.isfinite().all()
    with pytest.raises(UserError, match=rf"backbone\.layers\.0\.mixer: {kind} cannot run"):
        NETWORKS.parse({**base, "mask": "causal"}).build(VOCABULARY)


def test_linformer_refuses_longer_documents_by_name() -> None:
    layer = build("linformer", max_len=4)
    assert not layer.caps.length_general
    with pytest.raises(UserError, match="linformer knows positions up to 4: a document has 5"):
        alone(layer, documents(5)[0])


@pytest.mark.parametrize("kind", ["fnet", "linformer", "nystromformer"])
def test_documents_of_no_tokens_and_padding_harm_nobody(kind: str) -> None:
    layer, docs = build(kind), documents(3, 5)
    layout = Layout.from_rows([[Doc(3), Doc(0), Doc(5)]], 10)
    x = torch.cat((*docs, torch.full((2, D), float("inf"), dtype=torch.float64)))[None]
    x.requires_grad_()
    y = layer(x, Ctx(layout, Full())).y
    torch.testing.assert_close(y[0, :3], alone(layer, docs[0]), **TOL)
    torch.testing.assert_close(y[0, 3:8], alone(layer, docs[1]), **TOL)
    (grad,) = torch.autograd.grad(y[0, :8].sum(), x)
    assert grad[0, :8].isfinite().all() and (grad[0, 8:] == 0).all()


# ---- EcoFormer's codes ----


def test_code_products_count_equal_bits() -> None:
    layer, (x,) = build("ecoformer", heads=2, bits=9), documents(12)
    assert isinstance(layer, EcoFormer)
    u = x.view(1, 12, 2, 8)
    codes, phi = signs(layer.hash_values(u)), layer._map(u)
    hamming = (codes[:, :, None] != codes[:, None]).sum(-1)
    product = torch.einsum("bthr,bshr->btsh", codes, codes)
    assert torch.equal(product, (9 - 2 * hamming).double())
    similar = torch.einsum("bthr,bshr->btsh", phi, phi)
    torch.testing.assert_close(similar, (9.0 - hamming).double())
    assert hamming.unique().numel() > 3


def test_learned_codes_rank_pairs_better_than_random_ones() -> None:
    layer = build("ecoformer", heads=1, bits=8, anchors=16).float()
    x = torch.randn(1, 48, 1, D, generator=torch.Generator().manual_seed(0))
    weights = torch.softmax(x[0, :, 0] @ x[0, :, 0].T / 2, -1)

    def loss() -> Tensor:
        codes = layer.hash_values(x)[0, :, 0].tanh()
        return hash_loss(codes, codes, weights, 4)

    def gap() -> float:
        codes = signs(layer.hash_values(x))[0, :, 0]
        similar = codes @ codes.T / 8
        top, low = (weights.topk(4, -1, largest=most).indices for most in (True, False))
        return (similar.gather(-1, top).mean() - similar.gather(-1, low).mean()).item()

    before = gap()
    optimizer = torch.optim.Adam([layer.mix, layer.shift], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert gap() > before + 0.2
