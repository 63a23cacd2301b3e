"""Law `flat rows`: packed rows that stay whole, as on a GPU, give what documents alone give."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from laws import TOL, D, apply, build, context, layers
from torch import Tensor, nn

from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Full, Mask, Prefix, Window
from mm.model import length_buckets, memories, varlen
from mm.model.backbones.stack import StackConfig
from mm.model.layer import Layer, init_weights
from mm.model.mixers.attention import cross_attention
from mm.trainer.stage import compile_blocks

# Documents of one token, at a row's end, before padding; two rows.
LAYOUT = Layout.from_rows([[Doc(3), Doc(1), Doc(5)], [Doc(6), Doc(2)]], 9)


def _run(
    layer: Layer, flat: bool, monkeypatch: pytest.MonkeyPatch, mask: Mask | None = None
) -> list[Tensor]:
    """Outputs at tokens, and the gradients of the input and of every parameter."""
    monkeypatch.setattr(length_buckets, "FLAT", flat)
    torch.manual_seed(3)
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    tokens = (LAYOUT.fields.document > 0)[..., None]
    group = lambda f: f._replace(extra={"prefix": (f.position[..., 0] // 2 == 1).int()})
    given = {"mask": mask} if mask else {}
    layout = LAYOUT.map_fields(group) if mask else LAYOUT
    y = apply(layer, x, layout, **given).y * tokens
    weight = torch.randn(y.shape, dtype=y.dtype)
    given = [x, *layer.parameters()]
    grads = torch.autograd.grad((y * weight).sum(), given, allow_unused=True)
    return [
        y,
        *(torch.zeros_like(p) if g is None else g for p, g in zip(given, grads, strict=True)),
    ]


@layers
def test_whole_rows_equal_documents_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(name)
    asked = []
    for module in (varlen, memories, cross_attention):
        real = module.document_groups
        spy = lambda ctx, real=real: (asked.append(1), real(ctx))[1]
        monkeypatch.setattr(module, "document_groups", spy)
    apart = _run(layer, False, monkeypatch)
    asked.clear()
    whole = _run(layer, True, monkeypatch)
    torch.testing.assert_close(whole, apart, **TOL)
    says = any(getattr(m, "documents_apart", False) for m in layer.modules())
    assert not asked or says, "it takes documents apart: say so (`documents_apart`)"


@layers
def test_whole_rows_under_a_prefix_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(name)
    try:
        layer.check_mask(Prefix())
    except UserError:
        pytest.skip("it does not run under a prefix mask")
    apart = _run(layer, False, monkeypatch, Prefix())
    torch.testing.assert_close(_run(layer, True, monkeypatch, Prefix()), apart, **TOL)


MASKS: dict[str, tuple[Mask, bool]] = {
    "full": (Full(), True),
    "window": (Window(2), True),
    "prefix": (Prefix(), True),
    "no short form": (Prefix() & Window(3), False),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_with_a_short_form_need_no_matrix(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, short = MASKS[kind]
    layer = build("mixer:attention")
    apart = _run(layer, False, monkeypatch, mask)
    torch.testing.assert_close(_run(layer, True, monkeypatch, mask), apart, **TOL)
    with monkeypatch.context() as patch:
        patch.setattr(length_buckets, "FLAT", True)
        group = lambda f: f._replace(extra={"prefix": (f.position[..., 0] // 2 == 1).int()})
        found = layer.groups(
            context(layer, torch.zeros(2, 9, D), LAYOUT.map_fields(group), mask=mask)
        )
    assert (found.index is None and found.groups[0].length == 9) is short
    assert all(spec.mask.allowed_RTS is None for spec in found.groups) is short


def _rows(rng: np.random.Generator, T: int) -> Layout:
    """Two rows of documents of 1 to T tokens, padded or not."""
    rows = []
    for _ in range(2):
        left, docs = T - int(rng.integers(0, 5)), []
        while left:
            docs.append(Doc(int(rng.integers(1, min(left, T) + 1))))
            left -= docs[-1].length
        rows.append(docs)
    return Layout.from_rows(rows, T)


def _form(x: Tensor | int) -> object:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x


GRAPHS = ["attention", "local_attention gated_deltanet", "mamba2", "rwkv6", "rg_lru"]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", GRAPHS)
def test_two_hundred_packed_steps_need_two_graphs_a_kind_of_block(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(length_buckets, "FLAT", True)
    graphs: list[torch.fx.GraphModule] = []
    given: list[set[object]] = []  # of each graph what it met
    moved: list[int] = []
    where: dict[int, int] = {}

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        given.append(met := set())

        def run(*args: Tensor) -> object:
            met.add(tuple(_form(x) for x in args))
            for x in args:
                if isinstance(x, nn.Parameter) and where.setdefault(id(x), x.data_ptr()) != (
                    x.data_ptr()
                ):
                    moved.append(len(given))
            return graph.forward(*args)

        return run

    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled(self, backend=count))
    torch._dynamo.reset()
    net = StackConfig(pattern=pattern, depth=2 * len(pattern.split())).build(D)
    init_weights(net)
    compile_blocks(net)
    rng = np.random.default_rng(0)
    for _ in range(200):
        x = torch.randn(2, 24, D, requires_grad=True)
        net(x, context(net, x, _rows(rng, 24))).y.sum().backward()
    assert 1 <= len(graphs) <= 2 * len(pattern.split())
    # What a CUDA graph needs: the same shapes, strides and dtypes, and weights where they were.
    assert [len(met) for met in given] == [1] * len(graphs) and where and not moved
    torch._dynamo.reset()
