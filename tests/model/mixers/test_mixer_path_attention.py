"""PaTH attention and PaTH-FoX against products of matrices written out."""

from __future__ import annotations

import pytest
import torch
from attention_toys import build
from laws import TOL, alone, documents
from torch import Tensor
from torch.nn import functional as F

from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.kernels.path_attention import move_keys, path_attention


def naive_path(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, kept: Tensor | None = None
) -> Tensor:
    """One head `(T, K)`: the product of matrices written out, and the sum of log gates."""
    T, K = q.shape
    H = torch.eye(K, dtype=q.dtype) - beta[:, None, None] * w[:, :, None] * w[:, None, :]
    rows = []
    for i in range(T):
        logits = []
        for j in range(i + 1):
            product = torch.eye(K, dtype=q.dtype)
            for s in range(j + 1, i + 1):
                product = product @ H[s]
            passed = kept[j + 1 : i + 1].sum() if kept is not None else 0.0
            logits.append(k[j] @ product @ q[i] * K**-0.5 + passed)
        rows.append(torch.stack(logits).softmax(0) @ v[: i + 1])
    return torch.stack(rows)


def path_inputs(R: int, T: int, P: int, H: int = 2, G: int = 1, K: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(T + P)
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)
    w = F.normalize(r(R, T, G, K), dim=-1)
    made = [r(R, T, H, K), r(R, P + T, G, K), r(R, P + T, G, 3), w, 2 * r(R, T, G).sigmoid()]
    return [t.requires_grad_() for t in made]


def test_path_attention_is_the_papers_product() -> None:
    q, k, v, w, beta = path_inputs(1, 7, 0)
    for name in path_attention.implementations:
        with path_attention.using(name):
            y = path_attention(q, k, v, w, beta)
        for h in range(2):
            expected = naive_path(q[0, :, h], k[0, :, 0], v[0, :, 0], w[0, :, 0], beta[0, :, 0])
            torch.testing.assert_close(y[0, :, h], expected, **TOL)


@pytest.mark.parametrize("T,P", [(1, 0), (1, 5), (3, 0), (63, 2), (64, 0), (65, 3), (130, 0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_path_blocks_equal_the_reference(T: int, P: int, masked: bool, gated: bool) -> None:
    inputs, allowed, fades = path_inputs(2, T, P), None, []
    if gated:
        log = -torch.rand(2, P + T, 2, generator=torch.Generator().manual_seed(2)).double()
        fades = [c.detach().requires_grad_() for c in (log.cumsum(1)[:, P:], log.cumsum(1))]
    if masked:
        allowed = torch.rand(2, T, P + T, generator=torch.Generator().manual_seed(1)) < 0.7
        allowed[:, 0] = False
    outs = {}
    for name in ("reference", "blocks"):
        with path_attention.using(name), move_keys.using(name):
            score = ScoreSpec(**dict(zip(("fade_RTH", "fade_RSH"), fades, strict=False)))
            y = path_attention(*inputs, MaskSpec(allowed), score)
            keys = move_keys(inputs[1], *inputs[3:])
        loss = (y * y.detach().cos()).sum() + (keys * keys.detach().sin()).sum()
        outs[name] = [y, keys, *torch.autograd.grad(loss, [*inputs, *fades])]
    for got, expected in zip(outs["blocks"], outs["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_path_attention_that_moves_nothing_has_no_positions() -> None:
    layer, plain, (x,) = (
        build("path_attention", rank=3),
        build("attention", qk_norm=False),
        documents(9),
    )
    with torch.no_grad():
        layer.beta.weight.zero_()
        layer.beta_bias.fill_(-80.0)
    plain.load_state_dict({n: layer.state_dict()[n] for n in plain.state_dict()})
    torch.testing.assert_close(alone(layer, x), alone(plain, x), **TOL)


def test_path_fox_adds_the_sum_of_log_gates_to_the_papers_product() -> None:
    q, k, v, w, beta = path_inputs(1, 7, 0)
    kept = F.logsigmoid(torch.randn(1, 7, 2, dtype=torch.float64))
    c = kept.cumsum(1)
    y = path_attention(q, k, v, w, beta, score=ScoreSpec(fade_RTH=c, fade_RSH=c))
    for h in range(2):
        head = [q[0, :, h], *(x[0, :, 0] for x in (k, v, w, beta)), kept[0, :, h]]
        torch.testing.assert_close(y[0, :, h], naive_path(*head), **TOL)


def test_path_fox_that_moves_nothing_is_forgetting_attention() -> None:
    layer = build("path_attention", rank=3, forget_gate=True)
    fox, (x,) = build("attention", qk_norm=False, forget_gate=True), documents(9)
    with torch.no_grad():
        layer.beta.weight.zero_()
        layer.beta_bias.fill_(-80.0)
    fox.load_state_dict({n: layer.state_dict()[n] for n in fox.state_dict()})
    torch.testing.assert_close(alone(layer, x), alone(fox, x), **TOL)


def test_path_attention_of_half_precision_accumulates_wider() -> None:
    inputs = [t.detach() for t in path_inputs(1, 70, 0)]
    got = path_attention(*(t.bfloat16() for t in inputs))
    exact = path_attention(*(t.bfloat16().double() for t in inputs))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=1e-2)
