"""The laws `complete initialisation` and `one graph`, over whatever is registered.

Everything builds on the meta device and no NaN is left; torch.compile takes a block.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
import yaml
from laws import ROOT, TOL, VARIANTS, VOCABULARY, D, apply, build, context, layers
from thinned import every
from torch import Tensor, nn

from mm import config as yaml_config
from mm.kernels.attention.spec import MaskSpec
from mm.kernels.op import Op
from mm.layout import Layout
from mm.model.layer import Layer, Linear, init_weights
from mm.registry import (
    ADAPTERS,
    BLOCKS,
    EMBEDDERS,
    FFNS,
    HEADS,
    MIXERS,
    NETWORKS,
    Registry,
)
from mm.run import Run

# ---- everything builds on the meta device, initialisation is complete ----


def assert_init_fills(module: nn.Module) -> None:
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.is_floating_point():
                t.fill_(float("nan"))
            elif t.dtype != torch.bool:
                t.fill_(max(-(10**6), torch.iinfo(t.dtype).min))
            assert t.device.type == "cpu", name
    init_weights(module)
    left = [
        n
        for n, t in [*module.named_parameters(), *module.named_buffers()]
        if t.is_floating_point() and t.isnan().any()
    ]
    assert not left, f"init_weights leaves NaN in {left}"


@layers
def test_init_weights_fills_every_tensor_of_a_layer(name: str) -> None:
    with torch.device("meta"):
        layer = VARIANTS[name]()
    assert all(p.is_meta for p in layer.parameters())
    assert_init_fills(layer)


NO_BRANCH_END = {  # what depth scaling finds nothing in, and why
    "mixer:fnet": "it has no parameters",
    "mixer:mega": "a gate chooses between its branch and its input, so nothing grows with depth",
    "mixer:peg": "it adds positions, which no depth should shrink",
}


@pytest.mark.parametrize(
    "kind", [*(f"mixer:{kind}" for kind in MIXERS), *(f"ffn:{kind}" for kind in FFNS)]
)
def test_depth_scaling_finds_the_end_of_the_branch(kind: str) -> None:
    """The law `depth scaling`: every layer has matrices that `Linear.ends_branch` marks, in use."""
    if kind in NO_BRANCH_END:
        pytest.skip(NO_BRANCH_END[kind])
    layer = build(kind)
    ends = [m for m in layer.modules() if isinstance(m, Linear) and m.ends_branch]
    assert ends, f"{kind}: no matrix is named out, so a deep stack cannot scale this branch down"
    x = torch.randn(1, 6, D, dtype=torch.float64)
    before = apply(layer, x, Layout.plain(1, 6)).y
    for matrix in ends:
        matrix.rescale(0.0)
    after = apply(layer, x, Layout.plain(1, 6)).y
    assert not torch.allclose(after, before), "the matrix named out does not reach the output"


PLUGS = {
    "embedder": (EMBEDDERS, lambda c: c.build(20, D)),
    "adapter": (ADAPTERS, lambda c: c.build(D)),
    "head": (HEADS, lambda c: c.build(D, 20)),
    "network": (NETWORKS, lambda c: c.build(VOCABULARY)),
}


@pytest.mark.parametrize(
    "plug,kind", [(plug, kind) for plug, (registry, _) in PLUGS.items() for kind in registry]
)
def test_init_weights_fills_every_tensor_of_a_plug(plug: str, kind: str) -> None:
    registry, make = PLUGS[plug]
    with torch.device("meta"):
        module = make(registry.get(kind).smallest())
    assert_init_fills(module)


def yaml_files() -> list[str]:
    return sorted(str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", yaml_files())
def test_every_yaml_builds_on_the_meta_device(file: str) -> None:
    values = yaml_config.read(ROOT / "configs" / file)
    if "stages" in values:
        networks = [Run.load(ROOT / "configs" / file).model]
    else:
        # Everything else says its kind (the folder says which plug point, where several know it),
        # or names plug points.
        kind, folder = values.get("kind"), Path(file).parts[0]
        named = {k: v for k, v in values.items() if k in Registry.every} if kind is None else {}
        homes = [r for r in Registry.every.values() if kind in r]
        homes = [r for r in homes if r.name == folder] or homes
        assert homes or named, (
            f"configs/{file}: neither a run (stages:), a known kind ('{kind}') nor a plug point"
        )
        parsed = [(Registry.every[k], v) for k, v in named.items()] or [(homes[0], values)]
        networks = []
        for registry, value in parsed:
            config = registry.parse(value)
            networks += [config] if registry is NETWORKS else []
            if registry is MIXERS:
                with torch.device("meta"):
                    assert list(config.build(D).parameters())
    for network in networks:
        with torch.device("meta"):
            module = network.build(VOCABULARY)
        assert all(p.is_meta for p in module.parameters())


def test_the_configs_are_found() -> None:
    assert any(f.startswith("mixer/") for f in yaml_files()), (
        "the parametrisation above would be empty"
    )


# ---- torch.compile ----


COMPILED = [n for n in VARIANTS if n.split(":")[0] in ("mixer", "preset", "ffn", "block")]


# Mixers of all families; the slow test compiles all of them, and presets.
FAMILIES = "attention gla rwkv6 gated_deltanet mlstm mamba s5 rg_lru lstm short_conv ttt plstm"
BY_DEFAULT = {f"mixer:{name}" for name in FAMILIES.split()}


@pytest.mark.parametrize(
    "name", every(3, [n for n in COMPILED if n in BY_DEFAULT or n.startswith(("ffn:", "block:"))])
)
def test_compile_captures_a_block_as_one_graph(name: str) -> None:
    one_graph(name, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compile_captures_a_block_with_its_gradient(name: str) -> None:
    one_graph(name, backend="aot_eager")


def one_graph(name: str, backend: str) -> None:
    """Compile a block without a graph break and compare outputs and input gradients."""
    torch._dynamo.reset()
    if name.startswith(("mixer", "preset")):
        torch.manual_seed(0)
        layer: Layer = BLOCKS.get("prenorm")().build(
            D, VARIANTS[name](), FFNS.get("swiglu")(hidden=8).build(D)
        )
        init_weights(layer)
        layer = layer.double()
    else:
        layer = build(name)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    ctx = context(layer, x, Layout.plain(2, 5), ids=None)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    y, expected = compiled(x, ctx).y, layer(x, ctx).y
    torch.testing.assert_close(y, expected, **TOL)
    for a, b in zip(
        torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True
    ):
        torch.testing.assert_close(a, b, **TOL)


def ops() -> dict[str, Op]:
    import mm.kernels as kernels

    for module in pkgutil.iter_modules(kernels.__path__, "mm.kernels."):
        if module.ispkg:
            importlib.import_module(module.name)
    return {name: op for name, op in Op.every.items() if op.__module__.startswith("mm.kernels.")}


def example(op: str) -> tuple[Tensor, ...]:
    """Arguments of a small call of every Op: a new Op adds its own here."""
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    arguments = {
        "attention": (
            r(2, 5, 4, 6),
            r(2, 5, 2, 6),
            r(2, 5, 2, 3),
            MaskSpec(torch.ones(2, 5, 5, dtype=torch.bool).tril()),
        ),
        "decode_attention": (r(2, 4, 6), r(2, 5, 2, 6), r(2, 5, 2, 3), torch.tensor([5, 2])),
        "linear_scan": (
            r(2, 5, 3).sigmoid().detach().requires_grad_(),
            r(2, 5, 3),
            torch.rand(2, 5) < 0.3,
            r(2, 3),
        ),
        "linear_attention": (
            r(2, 5, 2, 3),
            r(2, 5, 2, 3),
            r(2, 5, 2, 4),
            -r(2, 5, 2, 3).exp().detach().requires_grad_(),
            r(2, 2, 3, 4),
        ),
        "linear_cross_entropy": (r(5, 4), r(7, 4), torch.randint(7, (5,)), r(7)),
        "rms_norm": (r(2, 5, 6), r(6)),
        "add_rms_norm": (r(2, 5, 6), r(2, 5, 6), r(6)),
        "norm_rotary": (r(2, 5, 3, 6), r(6), torch.randn(2, 2, 5, 1, 3)),
        "rotary": (r(2, 5, 3, 6), torch.randn(2, 2, 5, 1, 2)),
        "grouped_linear": (r(48, 6), r(3, 4, 6), torch.tensor([16, 16, 48], dtype=torch.int32)),
        "glu": (r(2, 5, 6), r(2, 5, 6)),
        "glu_halves": (r(2, 5, 6),),
        "dropout": (r(2, 5, 6), torch.randint(-32768, 32768, (60,)).short(), 6554),
        "causal_conv": (
            r(2, 5, 3),
            r(4, 3),
            r(3),
            torch.tensor([[1, 1, 2, 2, 2], [3, 3, 3, 3, 0]], dtype=torch.int32),
        ),
        "selective_scan": (
            r(2, 5, 3),
            r(2, 5, 3).abs().detach().requires_grad_(),
            (-r(4, 3).exp()).detach().requires_grad_(),
            r(2, 5, 4),
            r(2, 5, 4),
            r(3),
            torch.rand(2, 5) < 0.3,
            r(2, 4, 3),
        ),
        "complex_scan": (r(2, 5, 6), r(2, 5, 6), torch.rand(2, 5) < 0.3, r(2, 6)),
        "diagonal_ssm": (
            r(2, 5, 3),
            r(2, 3, 4),
            r(2, 3, 4),
            torch.rand(2, 5) < 0.3,
            r(2, 2, 3, 4),
            torch.tensor([5, 3]),
        ),
        "delta_rule": (
            r(2, 5, 2, 3),
            r(2, 5, 2, 3),
            r(2, 5, 2, 4),
            r(2, 5, 2).sigmoid().detach().requires_grad_(),
            (-r(2, 5, 2).exp()).detach().requires_grad_(),
            r(2, 2, 3, 4),
        ),
        "path_attention": (
            r(2, 5, 4, 3),
            r(2, 7, 2, 3),
            r(2, 7, 2, 4),
            torch.nn.functional.normalize(r(2, 5, 2, 3).detach(), dim=-1).requires_grad_(),
            (2 * r(2, 5, 2).sigmoid()).detach().requires_grad_(),
        ),
        "move_keys": (
            r(2, 7, 2, 3),
            torch.nn.functional.normalize(r(2, 5, 2, 3).detach(), dim=-1).requires_grad_(),
            (2 * r(2, 5, 2).sigmoid()).detach().requires_grad_(),
        ),
        "dense_ssm": (
            r(2, 5, 3),
            (0.3 * r(3, 4, 4)).detach().requires_grad_(),
            r(3, 4),
            r(3, 2, 4),
            r(2, 3, 4),
            torch.tensor([5, 3]),
        ),
        "rg_lru_gates": (r(2, 5, 6), r(2, 6), r(6).exp().detach().requires_grad_(), r(5, 6)),
    }
    assert op in arguments, f"give the Op '{op}' an example call here, so that the laws cover it"
    return arguments[op]


def test_there_are_ops() -> None:
    assert len(ops()) >= 7


@pytest.mark.parametrize(
    "name,implementation",
    [
        pytest.param(n, i, marks=pytest.mark.slow if i == "reference" and len(each) > 1 else ())
        for n, each in ((n, op.implementations) for n, op in ops().items())
        for i in each
    ],
)
def test_every_op_compiles_with_its_gradient(name: str, implementation: str) -> None:
    op, arguments = ops()[name], example(name)
    reason = op.implementations[implementation][1](*arguments)
    if reason:
        pytest.skip(f"{implementation}: {reason}")
    torch._dynamo.reset()
    total = lambda out: sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()
    leaves = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
    assert leaves
    with op.using(implementation):
        compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
        got, expected = compiled(*arguments), op(*arguments)
        torch.testing.assert_close(got, expected, **TOL)
        for a, b in zip(
            torch.autograd.grad(total(got), leaves),
            torch.autograd.grad(total(expected), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b, **TOL)


def test_yaml_files_are_plain() -> None:
    for file in yaml_files():
        assert isinstance(
            yaml.safe_load((ROOT / "configs" / file).read_text(encoding="utf-8")), dict
        ), file
