"""RoPE against its formulas written out in plain Python, without any other library."""

from __future__ import annotations

import contextlib
import math
from collections import Counter

import pytest
import torch

from mm.kernels.attention import attention as attention_op
from mm.kernels.op import Op
from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.positions.rope import Rope
from mm.plan.fake_cuda import CUDA, fake_cuda, grad
from mm.registry import MIXERS, POSITIONS


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_pairs_turn_by_the_base_to_the_share_of_what_is_rotated(fraction: float) -> None:
    """Pair i of the n rotated dimensions turns by ``place * theta ** (-2i / n)``, the rest by 0."""
    dim, theta = 16, 500.0
    rope = POSITIONS.get("rope")(theta=theta, fraction=fraction).build(dim)
    n = int(dim * fraction)
    x = torch.randn(1, 4, 1, dim, dtype=torch.float64)
    fields = Layout.plain(1, 4).fields
    turned, _ = rope.rotate(x, x, fields, fields)
    for place in range(4):
        old, new = x[0, place, 0].tolist(), turned[0, place, 0].tolist()
        for i in range(n // 2):
            angle = place * theta ** (-2 * i / n)
            a, b = old[i], old[i + n // 2]
            assert new[i] == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
            assert new[i + n // 2] == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=1e-6
            )
        assert new[n:] == old[n:]


@pytest.mark.parametrize("original", [512, 100])
def test_yarn_interpolates_between_its_two_corners(original: int) -> None:
    """Peng et al. 2023 (arXiv:2309.00071), eq. 22 to 25, corners rounded down and up.

    Of 100 places no pair makes 32 turns: the first corner is pair 0.
    """
    dim, theta, factor = 64, 10000.0, 8.0
    scaling = {"rule": "yarn", "factor": factor, "original": original}
    rope = POSITIONS.get("rope")(theta=theta, scaling=scaling).build(dim)
    cos, sin = rope.prepare(Layout.plain(1, 2).fields)[:, 0, 1, 0].double()
    corner = lambda turns: dim * math.log(original / (turns * 2 * math.pi)) / 2 / math.log(theta)
    begin, end = max(math.floor(corner(32.0)), 0), math.ceil(corner(1.0))
    assert end > corner(1.0) and begin < end < dim // 2
    assert 0 < begin < corner(32.0) if original == 512 else corner(32.0) < 0 == begin
    length = 0.1 * math.log(factor) + 1
    for i in range(dim // 2):
        share = min(1.0, max(0.0, (i - begin) / (end - begin)))
        speed = theta ** (-2 * i / dim) * (1 - share + share / factor)
        assert float(cos[i]) == pytest.approx(length * math.cos(speed), abs=1e-6), i
        assert float(sin[i]) == pytest.approx(length * math.sin(speed), abs=1e-6), i


def test_rules_that_depend_on_the_length_hold_within_the_first_one() -> None:
    """LongRoPE divides each pair's speed by its own factor; dynamic changes nothing; both stop."""
    dim, theta, slow = 8, 1000.0, [1.0, 1.25, 2.0, 4.0]
    kind = POSITIONS.get("rope")
    more = {"factor": 4.0, "original": 6}
    scaling = {"rule": "longrope", "short": slow, "long": [8.0] * 4, "length": 1.5, **more}
    rope = kind(theta=theta, scaling=scaling).build(dim)
    cos, sin = rope.prepare(Layout.plain(1, 6).fields)[:, 0, :, 0].double()
    for place in range(6):
        for i in range(dim // 2):
            angle = place * theta ** (-2 * i / dim) / slow[i]
            assert float(cos[place, i]) == pytest.approx(1.5 * math.cos(angle), abs=1e-6)
            assert float(sin[place, i]) == pytest.approx(1.5 * math.sin(angle), abs=1e-6)
    dynamic = kind(theta=theta, scaling={"rule": "dynamic", **more}).build(dim)
    plain, fields = kind(theta=theta).build(dim), Layout.plain(1, 6).fields
    assert torch.equal(dynamic.prepare(fields), plain.prepare(fields))
    for bounded in (rope, dynamic):
        with pytest.raises(ValueError, match="beyond the 6 for which"):
            bounded.prepare(Layout.plain(1, 7).fields)
    with pytest.raises(ValueError, match="need 4 factors each"):
        kind(theta=theta, scaling={**scaling, "short": [1.0]}).build(dim)


@pytest.mark.parametrize("qk_norm", [True, "zero_centred", "heads"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_layer_with_the_kernels_of_a_gpu_is_that_of_the_cpu(
    qk_norm: bool | str, fraction: float
) -> None:
    """Queries and keys normed and rotated at once: outputs and all gradients."""
    pytest.importorskip("triton")
    from triton_oracle import interpreted

    torch.manual_seed(0)
    position = {"kind": "rope", "fraction": fraction}
    layer = MIXERS.get("attention")(heads=2, kv_heads=1, qk_norm=qk_norm, position=position)
    layer = layer.build(16)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 5, 16, requires_grad=True)
    found, used = [], Counter[str]()
    for where in (contextlib.nullcontext(), interpreted()):
        used.clear()
        Op.observer = lambda op, *_: used.update([op.name])
        try:
            with where, attention_op.using("reference"):
                y = layer(x, Ctx(Layout.plain(2, 5), Causal())).y
                found.append((y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])))
        finally:
            Op.observer = None
    assert used["norm_rotary" if qk_norm != "heads" else "rotary"] == 2
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_a_rotation_is_one_launch_on_a_gpu_and_one_back() -> None:
    with fake_cuda() as reads:
        qkv = torch.empty(2, 8, 12, 16, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        table = torch.empty(2, 2, 8, 1, 6, device=CUDA)
        reads.kernels.clear()
        y = Rope(16, 1e4, rotated=12).apply(qkv[:, :, 4:8], table)
        assert reads.kernels == {"mm::rotary_triton": 1}
        grad(y, qkv)
    assert reads.kernels["mm::rotary_triton_backward"] == 1
    assert not {"aten::cat", "aten::mul.Tensor"} & reads.kernels.keys()
