"""What processes that share the tokens of a row pass each other, with gradients.

N processes, B rows, T tokens of a row, t = T / N of a slice, H heads.

Every process calls the same collectives in the same order, forward and backward, whatever its
slice holds: else they wait for each other, or for a weight that ZeRO stage 3 gathers, for ever. So
what one process has no use for is tied to its output all the same (`tie`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.model.layer import Adapter, Embedder, Head, Layer
from mm.model.varlen import PackedRows
from mm.shard import Shard


class Unconnected:
    """Stands for a group whose other processes are not there: nothing comes, what goes is counted.

    `mm plan` passes it as the group of a `Shard`.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()  # bytes of whole messages: "heads" and "states"


def _pass(what: str, x: Tensor, group: Any, *sizes: list[int]) -> Tensor:
    """What comes for ``x``, as large as it.

    Entry i of ``x`` goes to rank i and that of the result comes from there, or ``sizes`` elements.
    """
    sent = x.contiguous()
    if isinstance(group, Unconnected):
        group.sent[what] += sent.numel() * sent.element_size()
        return torch.zeros_like(sent)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got.view(-1), sent.view(-1), *sizes, group=group)
    return got


class _AllToAll(torch.autograd.Function):
    """Cut along one dimension, send part i to rank i, join what comes along another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, size: int, cut: int, join: int) -> Tensor:
        ctx.given = group, size, join, cut
        got = _pass("heads", torch.stack(x.chunk(size, cut)), group)
        return torch.cat(got.unbind(0), join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _AllToAll.apply(grad, *ctx.given), None, None, None, None


def tokens_to_heads(x: Tensor, shard: Shard) -> Tensor:
    """`(B, t, H, ...)` to `(B, T, H / N, ...)`: all tokens of some heads (Ulysses).

    Source: Jacobs et al. 2023 (arXiv:2309.14509), section 3.1.
    """
    return _AllToAll.apply(x, shard.group, shard.size, 2, 1)


def heads_to_tokens(x: Tensor, shard: Shard) -> Tensor:
    """Inverse of `tokens_to_heads`."""
    return _AllToAll.apply(x, shard.group, shard.size, 1, 2)


def _send(x: Tensor, shard: Shard, step: int) -> Tensor:
    """``x`` of rank ``rank - step``; zeros where there is no such rank."""
    N, n, source = shard.size, x.numel(), shard.rank - step
    sizes = lambda other: [n * (rank == other % N) for rank in range(N)]
    # In a circle: not every backend takes empty buffers.
    got = _pass("states", x, shard.group, sizes(source), sizes(shard.rank + step))
    return got if 0 <= source < N else torch.zeros_like(x)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return _send(x, shard, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _send(grad, ctx.shard, -1), None


def shift(x: Tensor, shard: Shard) -> Tensor:
    """``x`` of the process before; zeros in the first one."""
    return _Shift.apply(x, shard)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return _pass("states", x.expand(shard.size, *x.shape), shard.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _pass("states", grad, ctx.shard.group).sum(0), None


def gather(x: Tensor, shard: Shard) -> Tensor:
    """``x`` of every process, `(N, ...)`."""
    return _Gather.apply(x, shard)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in others]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=d, device=at) for shape, d, at in ctx.like]
        return grad, *zeros


def tie(y: Tensor, *others: Tensor) -> Tensor:
    """``y``, with gradients of zero for ``others``: their backward runs in every process."""
    return _Tie.apply(y, *others)


def halo(x_BtW: Tensor, n: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """The slice with the ``n`` tokens before it `(B, n + t, W)`, and their documents `(B, n + t)`.

    The documents have the numbers of the whole row.
    """
    t, document = shard.tokens, shard.whole.fields.document
    if n <= t:
        past = shift(x_BtW[:, t - n :], shard)
    else:  # from several slices
        past = shard.before(torch.cat(gather(x_BtW, shard).unbind(0), 1), n)
    both = torch.cat((shard.before(document, n), shard.slice(document)), 1)
    return torch.cat((past, x_BtW), 1), both


class Link(NamedTuple):
    """How the state before a slice that is all one document becomes the one after it.

    Attributes:
        join: ``join(total, before, own)`` is the state after the slice: ``own`` is what it leaves
            that began from the initial state.
        total: makes `(B, ...)`, what the slice does to a state, sent along with its own; None where
            each process knows it without.
        shape: of one row of it.
        leave: ``own`` of rows of one document, where outputs take longer; None: they are run.
    """

    join: Callable[[Any, Tensor, Tensor], Tensor]
    total: Callable[[], Tensor] | None = None
    shape: tuple[int, ...] = ()
    leave: Callable[[PackedRows], Tensor] | None = None


def decay(total: Callable[[], Tensor], *shape: int) -> Link:
    """``total * before + own``."""
    return Link(lambda a, before, own: a * before + own, total, shape)


Run = Callable[[PackedRows, Tensor], tuple[Tensor, Tensor]]


def carry_over(
    fresh: Callable[[], Tensor], run: Run, initial_B: Tensor, shard: Shard, link: Link | None
) -> Tensor:
    """Outputs `(B, t, ...)` of a recurrence over documents that go through several processes.

    With a ``link`` all processes work at once: each makes the state that its slice leaves from
    nothing, all gather them, each joins those before its own and runs what goes on from there.
    Without one they wait for each other, but for the recurrence alone. Bytes: states, whatever T.

    Args:
        fresh: outputs `(B, t, ...)` with every document of the slice taken for a whole one.
        run: outputs and last states of rows that begin from given states.
        initial_B: `(B, ...)` a document's initial state.
    """
    B = initial_B.shape[0]
    head = PackedRows.of(shard.head, B) if shard.head is not None else None
    own = initial_B.detach()
    if shard.rank < shard.size - 1:  # what the last slice leaves nobody reads
        tail = PackedRows.of(shard.tail, B)
        if link is not None and link.leave is not None:
            own = link.leave(tail)
        else:
            y, own = run(tail, initial_B)
            if shard.alone:  # the last document of each row is its only one
                fresh = lambda: tail.pack(y)
    if torch.is_grad_enabled() and not own.requires_grad:
        own = own.detach().requires_grad_()  # all processes alike
    passes = shard.passes.view(shard.size, B, *[1] * (own.dim() - 1))
    if link is None:
        return _one_after_another(fresh, run, initial_B, own, head, shard, passes)
    parts = [own]
    if link.total is not None:
        # Asked for where a state goes in and out.
        needed = 0 < shard.rank < shard.size - 1 and shard.through
        parts.append(link.total() if needed else own.new_zeros(B, *link.shape))
    flat = gather(torch.cat([x.flatten(1).to(initial_B.dtype) for x in parts], 1), shard)
    before = initial_B
    for rank in range(shard.rank):
        split = flat[rank].split([x[0].numel() for x in parts], 1)
        state, *total = (x.view(p.shape) for x, p in zip(split, parts, strict=True))
        # Zeros elsewhere: what is not chosen has a gradient, too, and may begin from -inf.
        inner = lambda x, here=passes[rank]: torch.where(here, x, 0.0)
        joined = link.join(total[0] if total else None, inner(before), inner(state))
        before = torch.where(passes[rank], joined, state)
    return tie(_joined(fresh, run, head, shard, before)[0], flat)


def _joined(
    fresh: Callable[[], Tensor], run: Run, head: PackedRows | None, shard: Shard, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of what goes on from ``before`` and of what begins here; the former's last states."""
    if head is None:
        return fresh(), before
    y, last = run(head, before)
    if not shard.begins:
        return y, last
    valid = head.valid.view(*head.valid.shape, *[1] * (y.dim() - 2))
    return torch.where(valid, y, fresh()), last


class _Round(torch.autograd.Function):
    """One state goes one rank on, while all others take part; the token orders the rounds."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, state: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        ctx.shard = shard
        return token.clone(), _send(state, shard, 1)

    @staticmethod
    def backward(ctx: Any, token: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return token, _send(grad, ctx.shard, -1), None


def _one_after_another(
    fresh: Callable[[], Tensor],
    run: Run,
    initial: Tensor,
    own: Tensor,
    head: PackedRows | None,
    shard: Shard,
    passes: Tensor,
) -> Tensor:
    """`carry_over` in rounds: in round r, rank r knows what it begins from and passes on."""
    token = own.new_zeros(()).requires_grad_(torch.is_grad_enabled())
    before, y = initial.to(own.dtype), own.new_zeros(())
    for r in range(shard.size):
        after = own.detach()
        if r == shard.rank:
            y, last = _joined(fresh, run, head, shard, before)
            after = torch.where(passes[r], last, own)
        if r == shard.size - 1:
            break
        token, got = _Round.apply(token, after, shard)
        if r == shard.rank - 1:
            before = got
    return tie(y, token)


def why_not(module: nn.Module, size: int) -> str | None:
    """Why ``size`` processes cannot share the tokens of rows in a network; None: they can.

    Everything in it says how in `Caps.shard`, or in its ``shard`` where it is no layer: local
    (nothing goes from one token to another), ulysses (each process takes all tokens of some heads),
    carry (states go from one to the next) or halo (the last tokens do). What says nothing is
    refused. Adapters fill their places, as many as there are values, in every process.
    """
    for name, part in _shared_parts(module):
        where = name or "the layer"
        known = isinstance(part, Layer | Embedder | Adapter | Head)
        if isinstance(part, Adapter):
            shard = "local" if part.keeps_length else None
        else:
            shard = part.caps.shard if isinstance(part, Layer) else getattr(part, "shard", None)
        if known and shard is None:
            kind = getattr(part, "kind", "") or type(part).__name__
            return f"{where}: {kind} cannot share the tokens of a row"
        asked = getattr(part, "check_shard", None)
        if asked is not None and (why := asked(size)) is not None:
            return f"{where}: {why}"
    return None


def _shared_parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all in it, but not in adapters: each process runs these on whole items."""
    yield name, module
    if not isinstance(module, Adapter):
        for child_name, child in module.named_children():
            yield from _shared_parts(child, f"{name}.{child_name}" if name else child_name)
