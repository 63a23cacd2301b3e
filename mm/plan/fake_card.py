"""A card that is not there: what torch and Triton ask a GPU of itself, answered as an H100 would.

With it Inductor writes the Triton code of a compiled module for device cuda without a driver:
what is generated can be read and counted, nothing is built for the card and nothing is launched.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", 9.0; H100 SXM
CAPABILITY = (9, 0)
SHARED = 232_448  # bytes of shared memory that a block may ask for
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32,
    total_memory=80 << 30, regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block=49_152, L2_cache_size=50 << 20,
    shared_memory_per_block_optin=SHARED, shared_memory_per_multiprocessor=233_472, gcnArchName="",
)  # fmt: skip


@contextlib.contextmanager
def fake_card() -> Iterator[None]:
    """Within `fake_cuda`: the device says what it is, and SDPA takes the kernels of a GPU."""
    from torch._dynamo.device_interface import CudaInterface

    with contextlib.ExitStack() as stack:
        patch = lambda *a: stack.enter_context(unittest.mock.patch.object(*a))
        patch(torch.cuda, "_lazy_init", lambda: None)
        # DeepSpeed has torch count devices to see whether there is one, and fake tensors would
        # then copy constants to it.
        patch(torch.cuda, "is_available", lambda: False)
        patch(torch.cuda, "device_count", lambda: 1)
        patch(torch.cuda, "current_device", lambda: 0)
        patch(torch.cuda, "get_device_properties", lambda *_: PROPERTIES)
        patch(torch.cuda, "get_device_capability", lambda *_: CAPABILITY)
        for of in (CudaInterface, CudaInterface.Worker):
            patch(of, "current_device", staticmethod(lambda: 0))
            patch(of, "get_device_properties", staticmethod(lambda *_: PROPERTIES))
        patch(F, "scaled_dot_product_attention", _sdpa)
        yield


@torch.compiler.assume_constant_result
def _asks_cudnn() -> bool:
    return torch._C._get_sdp_priority_order()[0] == SDPBackend.CUDNN_ATTENTION.value


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` as torch runs it on a GPU; fake tensors get the plain form.

    Source: torch, aten/src/ATen/native/transformers/attention.cpp and cuda/sdp_utils.cpp: flash
    for half precision without a mask and heads up to 256, padded to a multiple of 8; else the
    memory-efficient one; cuDNN where it was asked for, else never.
    """
    width = q.shape[-1]
    same = v.shape[-1] == width
    if _asks_cudnn():
        return torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]
    if attn_mask is None and same and width <= 256 and q.dtype in (torch.bfloat16, torch.float16):
        if width % 8:
            scale = width**-0.5 if scale is None else scale
            q, k, v = (F.pad(x, (0, 8 - width % 8)) for x in (q, k, v))
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, scale=scale
        )
        return found[0][..., :width]
    if k.shape[-3] != q.shape[-3]:
        times = q.shape[-3] // k.shape[-3]
        k, v = (x.repeat_interleave(times, -3) for x in (k, v))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # the kernel adds it
            zero = torch.zeros((), dtype=q.dtype, device=q.device)
            attn_mask = torch.where(attn_mask, zero, float("-inf"))
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


class _OnHost(TorchDispatchMode):
    """Makes on the host what would be made on the card: values that Inductor folds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


class Code(NamedTuple):
    """What Inductor makes of a graph in one direction.

    Attributes:
        source: Python that launches the kernels.
        traffic: bytes that the kernels which it wrote read and write.
        refusal: why Inductor would not capture it as a CUDA graph, or None.
    """

    source: str
    traffic: int
    refusal: str | None


def _refusal(graph: Any) -> str | None:
    """What Inductor asks of a graph before it captures it, in its own words."""
    from torch._inductor.cudagraph_utils import check_lowering_disable_cudagraph
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    if why := graph.disable_cudagraphs_reason:
        return str(why)
    if why := check_lowering_disable_cudagraph(graph.device_node_mapping):
        return str(why)
    if node := get_first_incompatible_cudagraph_node(graph.module):
        return f"operator {node.target}"
    return f"it changes {', '.join(graph.mutated_inputs)}" if graph.mutated_inputs else None


@contextlib.contextmanager
def _compiler(
    codes: list[Code], options: Mapping[str, bool], load: Callable[[str], Callable[..., Any]]
) -> Iterator[None]:
    """Inductor for the card; its code is put into ``codes`` and loaded by ``load``."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.constant_folding import ConstantFolder
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch.utils import _triton as triton

    def keep(graph: GraphLowering) -> Any:
        code: Any = graph.codegen()[0]
        others = (ExternKernelSchedulerNode, NopKernelSchedulerNode)
        written = [n for n in graph.scheduler.nodes if not isinstance(n, others)]
        traffic = sum(int(n.get_read_write_buffers_sizes()) for n in written)
        codes.append(Code(code.value, traffic, _refusal(graph)))
        return SimpleNamespace(call=load(code.value), __file__="kept", key="kept")

    def fold(folder: ConstantFolder, run: Any = ConstantFolder.run) -> Any:
        with _OnHost():
            return run(folder)

    with contextlib.ExitStack() as stack:
        patch = lambda *a: stack.enter_context(unittest.mock.patch.object(*a))
        state = lambda *_: torch.zeros(16, dtype=torch.uint8, device="cpu")
        for answer in [f for f in vars(triton).values() if hasattr(f, "cache_clear")]:
            answer.cache_clear()  # whether there is Triton: of this machine before, of the card now
            stack.callback(answer.cache_clear)
        patch(torch, "Generator", torch._C.Generator)
        patch(torch.cuda, "is_available", lambda: True)
        patch(torch.cuda, "get_rng_state", state)
        patch(torch.cuda, "set_rng_state", lambda *_: None)
        patch(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch(torch.cuda, "_exchange_device", lambda _: 0)
        patch(torch.cuda, "_maybe_exchange_device", lambda _: 0)
        patch(CudaInterface, "is_available", staticmethod(lambda: True))
        patch(CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90))
        patch(triton, "triton_backend", lambda: None)  # it asks the driver which card there is
        patch(triton, "triton_hash_with_backend", lambda: "")
        patch(ConstantFolder, "run", fold)
        patch(GraphLowering, "compile_to_module", keep)
        stack.enter_context(
            inductor.patch(
                {"compile_threads": 1, "fx_graph_cache": False, "shape_padding": False, **options}
            )
        )
        stack.enter_context(
            functorch.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)
        )
        yield


class Graph(NamedTuple):
    """A graph of a compiled module.

    Attributes:
        codes: forward and backward.
        inputs: where each input comes from, an expression of the local names `L` of the call.
        call: runs what ``load`` made of the codes, under autograd.
    """

    codes: list[Code]
    inputs: list[str]
    call: Callable[..., Any]


def compiled_graphs(
    module: nn.Module,
    run: Callable[[Callable[..., Any]], Any],
    options: Mapping[str, bool] | None = None,
    load: Callable[[str], Callable[..., Any]] = lambda source: lambda args: None,
) -> list[Graph]:
    """What `torch.compile` with Inductor makes of a module on the card.

    Call in `fake_cuda` and `fake_card`.

    Args:
        run: calls the module that it is given as it is called in training.
        options: of Inductor, beside its own.
        load: makes a code's source callable with a list of its inputs.
    """
    with unittest.mock.patch.object(torch, "Generator", torch._C.Generator):
        from torch._inductor.compile_fx import compile_fx

    graphs: list[Graph] = []

    def backend(graph: Any, inputs: Any) -> Any:
        codes: list[Code] = []
        given = [n for n in graph.graph.nodes if n.op == "placeholder"]
        origins = [n.meta["grapharg"].source.name for n in given]
        with _compiler(codes, options or {}, load):
            call: Any = compile_fx(graph, inputs)
        graphs.append(Graph(codes, origins, call))
        return graph.forward  # what follows runs on, as it is

    torch._dynamo.reset()
    try:
        with _pop_mode_temporarily(), _compiler([], options or {}, load):
            run(torch.compile(module, backend=backend, dynamic=False))
    finally:
        torch._dynamo.reset()
    return graphs
