"""Launches that mixers make fit the cards: registers, spills, shared memory, matrix instructions.

Binaries are built without a GPU for sm_80, sm_90 and sm_100, and for the two ends of the cards with
99 KB of shared memory, sm_86 and sm_120: every width that `why_not` takes.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernel_checks import everything, packed
from triton_oracle import built, recorded

from mm.kernels import device
from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec
from mm.kernels.complex_scan import complex_scan
from mm.kernels.delta_rule import delta_rule
from mm.kernels.diagonal_ssm import diagonal_ssm
from mm.kernels.rms_norm import add_rms_norm
from mm.kernels.selective_scan import selective_scan
from mm.model.mixers.linear_attention.delta_rule import DeltaRuleConfig

WIDTHS = [(width, "bf16") for width in (32, 64, 128, 160, 256)] + [(64, "fp32"), (128, "fp32")]
CARDS = (*device.CARDS, 120)
SPECS = {"causal": lambda: (MaskSpec(causal=True),), "packed": packed, "everything": everything}


@pytest.mark.slow
@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("width, dtype", WIDTHS)
@pytest.mark.parametrize("card", CARDS)
def test_attention(card: int, width: int, dtype: str, specs: str) -> None:
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    q = torch.empty(1, 64, 8, width, dtype=kind, requires_grad=True)
    k = torch.empty(1, 64, 2, width, dtype=kind, requires_grad=True)
    with recorded(card) as launches, attention.using("triton"):
        attention(q, k, k, *SPECS[specs]()).float().sum().backward()
    made = [built(x) for x in launches]
    rest = ["_find_ranges", "_dots_with_outputs"]
    dots = [one.check(dot=True) for one in made if one.name not in rest]
    assert [one.name for one in dots] == ["_forward", "_by_queries", "_by_keys"]
    others = [one.check().name for one in made if one.name in rest]
    assert sorted(others) == rest[1:] + rest[:1] * (0 if specs == "causal" else 3)
    if card == 90 and dtype == "bf16":
        assert all(one.wgmma > 0 for one in dots), dots


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("K", [64, 128, 256])
def test_delta_rule(K: int, card: int) -> None:
    B, T, H = 1, 8192, 8
    q, k, v = (torch.empty(B, T, H, K, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    beta = torch.empty(B, T, H)
    with recorded(card) as launches, delta_rule.using("triton"):
        o, _ = delta_rule(q, k, v, beta, beta, torch.empty(B, H, K, K))
        o.backward(torch.empty_like(o))
    kernels = {x.kernel.__name__: x for x in launches}  # some run in both directions
    built(kernels.pop("_sum_parts")).check()  # it multiplies nothing
    assert len(kernels) == 9
    for launch in kernels.values():
        built(launch).check(dot=True)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("D", [1000, 1024, 2048, 4096, 8192])
def test_add_rms_norm(D: int, card: int) -> None:
    """Of a stream and branches in either dtype, with all gradients and without the sum's."""
    wide, narrow = (
        torch.empty(1, 256, D, dtype=kind, requires_grad=True)  # rows are in no binary
        for kind in (torch.float32, torch.bfloat16)
    )
    with recorded(card) as launches, add_rms_norm.using("triton"):
        for x, branch in ((wide, wide), (wide, narrow), (narrow, narrow)):
            total, y = add_rms_norm(x, branch, torch.empty(D, requires_grad=True))
            (total.float().sum() + y.float().sum()).backward(retain_graph=True)
            y.float().sum().backward()
    names = [built(launch).check().name for launch in launches]
    assert names == ["_forward", "_backward", "_backward"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("D, cut", [(1024, 2), (4096, 1)])
def test_selective_scan_of_one_row(D: int, cut: int, card: int) -> None:
    """Both directions in segments; the forward alone."""
    full = lambda *shape: torch.empty(*shape, requires_grad=True)
    narrow = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True)
    bc = [narrow(1, 4096, 16) for _ in "bc"]
    reset = torch.empty(1, 4096).bool()
    with recorded(card) as launches, selective_scan.using("triton"):
        for given in ((reset, None), (None, full(1, 16, D))):
            u, dt = narrow(1, 4096, D), full(1, 4096, D)
            y, last = selective_scan(u, dt, full(16, D), *bc, full(D), *given)
            (y.float().sum() + last.sum()).backward()
    made = [built(x).check() for x in launches]
    kernels = ["_ends", "_forward", *["_ends"] * (cut - 1), "_backward", "_sum_parts", "_sum_parts"]
    assert [one.name for one in made] == kernels * 2


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_complex_recurrences(card: int) -> None:
    """They take float32; with documents, and with a state to begin from."""
    full = lambda *shape: torch.empty(*shape, requires_grad=True)
    D, N, T = 2048, 16, 4096
    with (
        recorded(card) as launches,
        diagonal_ssm.using("triton"),
        complex_scan.using("triton"),
    ):
        for reset in (None, torch.empty(1, T).bool()):
            begun = reset is None
            a, c = full(2, D, N), full(2, D, N)
            first = full(1, 2, D, N) if begun else None
            y, last = diagonal_ssm(full(1, T, D), a, c, reset, first)
            (y.sum() + last.sum()).backward()
            for decay in (full(1, T, D), full(D)):
                h, last = complex_scan(decay, full(1, T, D), reset, full(1, D) if begun else None)
                (h.sum() + last.sum()).backward()
    assert len({built(x).check().name for x in launches}) == 3


def test_default_heads_of_the_delta_rule_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "KIND", "cpu")
    why_not = delta_rule.implementations["triton"][1]
    for d_model in (16, 512, 1024, 1536, 2048, 3072, 4096, 8192):
        with torch.device("meta"):
            layer = DeltaRuleConfig(gate="scalar").build(d_model)
        assert layer.heads * layer.key_dim == d_model
        assert layer.heads == 4 or layer.key_dim > 128  # as few as fit
        q = torch.empty(1, 2, layer.heads, layer.key_dim)
        beta = torch.empty(1, 2, layer.heads)
        assert why_not(q, q, q, beta, beta) is None, d_model
