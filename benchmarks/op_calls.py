"""A call of a training step of every op of mm.kernels, in values that its mathematics allows.

The table of docs/how-to/gpu.md makes them on fake tensors, `make gpu` on the GPU, where each
implementation is compared with the reference. A new op adds its call here (a test says so).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.kernels import check

Row = dict[str, Any]
Call = Callable[[int, torch.dtype, int], tuple[Any, ...]]  # tokens, dtype, width of a head
BLOCK = 16  # rows of grouped_linear


class Sizes(NamedTuple):
    """Of the calls, besides tokens and the width of a head."""

    heads: int = 8
    width: int = 1024  # of the model
    states: int = 64  # of a dense state-space model
    classes: int = 32_000
    documents: int = 13  # of a packed row


class Maker:
    """Random leaves on one device; their gradients are those that are compared."""

    def __init__(self, device: Any):
        self.device = device

    def leaf(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).detach().requires_grad_()

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1) -> Tensor:
        return self.leaf(scale * torch.randn(shape, device=self.device), dtype)

    def gate(self, *shape: int, dtype: torch.dtype = torch.float32, most: float = 1) -> Tensor:
        """In (0, ``most``)."""
        return self.leaf(most * torch.randn(shape, device=self.device).sigmoid(), dtype)

    def positive(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1) -> Tensor:
        return self.leaf(scale * torch.rand(shape, device=self.device) + 0.1 * scale, dtype)

    def negative(self, *shape: int, scale: float = 0.1) -> Tensor:
        """Logarithms of decays, and rates."""
        return self.leaf(-scale * torch.rand(shape, device=self.device), torch.float32)

    def unit(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Vectors of length one."""
        x = torch.randn(shape, device=self.device)
        return self.leaf(torch.nn.functional.normalize(x, dim=-1), dtype)

    def some(self, *shape: int) -> Tensor:
        """True at one place of sixteen."""
        return torch.rand(shape, device=self.device) < 1 / 16

    def choice(self, n: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(n, shape, device=self.device, dtype=dtype)

    def decays(self, D: int, N: int) -> Tensor:
        """(2, D, N): complex numbers within the unit circle."""
        size, angle = (torch.rand(D, N, device=self.device) for _ in range(2))
        size, angle = 0.5 + 0.45 * size, 3 * angle
        return self.leaf(torch.stack((size * angle.cos(), size * angle.sin())), torch.float32)

    def angles(self, t: int, k: int) -> Tensor:
        """(2, 1, t, 1, k / 2): cosines and sines, without gradient."""
        x = 3 * torch.randn(1, t, 1, k // 2, device=self.device)
        return torch.stack((x.cos(), x.sin()))


def op_calls(device: Any, sizes: Sizes = Sizes()) -> dict[str, tuple[str, Call]]:  # noqa: B008
    """Op and its arguments by what a table calls it; values are drawn anew at every call."""
    from mm.kernels.attention.spec import MaskSpec, ScoreSpec

    H, D, S, N, n = sizes
    new = Maker(device)
    qkv = lambda t, d, k: tuple(new.normal(1, t, h, k, dtype=d) for h in (H, H // 2, H // 2))
    even = lambda t, d, k: tuple(
        new.normal(1, t, H, k, dtype=d, scale=s) for s in (k**-0.5, k**-0.5, 1)
    )
    each = lambda t: -(-t // n)
    many = lambda t: (torch.arange(t, device=device) // each(t) + 1).int()[None]
    borders = lambda t: (torch.arange(n + 1, device=device) * each(t)).clamp(max=t).int()
    path = lambda t, d, k: (
        new.unit(1, t, H // 2, k, dtype=d), new.gate(1, t, H // 2, dtype=d, most=2)
    )  # fmt: skip
    ends = lambda t: (torch.arange(1, 9, device=device) * t // (8 * BLOCK) * BLOCK).int()

    def attention(mask: Callable[[int], Any], score: Any = None) -> tuple[str, Call]:
        more = () if score is None else (score,)
        return "attention", lambda t, d, k: (*qkv(t, d, k), mask(t), *more)

    documents = lambda t: MaskSpec(
        causal=True, document_RT=many(t), document_RS=many(t), starts_M=borders(t)
    )

    def prefixes(t: int) -> Any:
        """The first third of every document sees itself in both directions."""
        place = torch.arange(t, device=device) % each(t)
        prefix = many(t) * (place < each(t) // 3).int()
        return documents(t)._replace(prefix_RT=prefix, prefix_RS=prefix)

    return {
        "attention, causal": attention(lambda t: MaskSpec(causal=True)),
        "attention, packed documents": attention(documents),
        "attention, packed documents with a prefix": attention(prefixes),
        "attention, window": attention(lambda t: MaskSpec(causal=True, window=128)),
        "attention, soft-cap": attention(lambda t: MaskSpec(causal=True), ScoreSpec(softcap=30.0)),
        "decode_attention": (
            "decode_attention",
            lambda t, d, k: (
                new.normal(8, H, k, dtype=d), *(new.normal(8, t, H, k, dtype=d) for _ in range(2)),
                t - torch.arange(8, device=device) * (t // 8),
            ),
        ),
        "linear_attention, a decay a head": (
            "linear_attention", lambda t, d, k: (*even(t, d, k), new.negative(1, t, H)),
        ),
        "linear_attention, a decay a channel": (
            "linear_attention", lambda t, d, k: (*even(t, d, k), new.negative(1, t, H, k)),
        ),
        "delta_rule": (
            "delta_rule",
            lambda t, d, k: (
                *(new.unit(1, t, H, k, dtype=d) for _ in range(2)), new.normal(1, t, H, k, dtype=d),
                new.gate(1, t, H), new.negative(1, t, H),
            ),
        ),
        "path_attention": (
            "path_attention",
            lambda t, d, k: (*qkv(t, d, k), *path(t, d, k), MaskSpec(causal=True)),
        ),
        "move_keys": ("move_keys", lambda t, d, k: (qkv(t, d, k)[1], *path(t, d, k))),
        "selective_scan": (
            "selective_scan",
            lambda t, d, k: (
                new.normal(1, t, D, dtype=d), new.positive(1, t, D, dtype=d, scale=0.1),
                new.negative(16, D, scale=8), *(new.normal(1, t, 16, dtype=d) for _ in range(2)),
                new.normal(D), new.some(1, t),
            ),
        ),
        "linear_scan": (
            "linear_scan",
            lambda t, d, k: (
                new.gate(1, t, D, dtype=d), new.normal(1, t, D, dtype=d), new.some(1, t)
            ),
        ),
        "complex_scan": (
            "complex_scan",
            lambda t, d, k: (
                new.leaf(1.3 * torch.rand(2 * D, device=device) - 0.65, d),
                new.normal(1, t, 2 * D, dtype=d), new.some(1, t),
            ),
        ),
        "diagonal_ssm": (
            "diagonal_ssm",
            lambda t, d, k: (
                new.normal(1, t, D, dtype=d), new.decays(D, 16), new.normal(2, D, 16),
                new.some(1, t),
            ),
        ),
        "dense_ssm": (
            "dense_ssm",
            lambda t, d, k: (
                new.normal(1, t, D, dtype=d), new.normal(1, S, S, scale=0.5 * S**-0.5),
                new.normal(1, S), new.normal(1, 1, S),
            ),
        ),
        "causal_conv": (
            "causal_conv",
            lambda t, d, k: (
                new.normal(1, t, D, dtype=d), new.normal(4, D), new.normal(D), many(t)
            ),
        ),
        "rg_lru_gates": (
            "rg_lru_gates",
            lambda t, d, k: (
                new.normal(H, t, 2 * k, dtype=d), new.normal(H, 2 * k), new.positive(H * k),
                new.normal(t, H * k, dtype=d),
            ),
        ),
        "rms_norm": (
            "rms_norm", lambda t, d, k: (new.normal(1, t, D, dtype=d), new.normal(D), 1e-6)
        ),
        "add_rms_norm": (
            "add_rms_norm",
            lambda t, d, k: (
                *(new.normal(1, t, D, dtype=d) for _ in range(2)), new.normal(D), 1e-6
            ),
        ),
        "glu": ("glu", lambda t, d, k: tuple(new.normal(1, t, D, dtype=d) for _ in range(2))),
        "glu_halves": ("glu_halves", lambda t, d, k: (new.normal(1, t, 2 * D, dtype=d),)),
        "rotary": (
            "rotary", lambda t, d, k: (new.normal(1, t, H, k, dtype=d), new.angles(t, k))
        ),
        "norm_rotary": (
            "norm_rotary",
            lambda t, d, k: (
                new.normal(1, t, H, k, dtype=d), new.normal(k), new.angles(t, k), 1e-6
            ),
        ),
        "dropout": (
            "dropout",
            lambda t, d, k: (
                new.normal(1, t, D, dtype=d), (new.choice(2**16, t * D) - 2**15).short(), 6554
            ),
        ),
        "grouped_linear": (
            "grouped_linear",
            lambda t, d, k: (
                new.normal(t, D, dtype=d), new.normal(8, D, D, dtype=d, scale=D**-0.5), ends(t)
            ),
        ),
        "linear_cross_entropy": (
            "linear_cross_entropy",
            lambda t, d, k: (
                new.normal(t, D, dtype=d), new.normal(N, D, scale=D**-0.5), new.choice(N, t)
            ),
        ),
    }  # fmt: skip


# ---- each implementation against the reference ----

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the root mean square of each output and gradient, against the reference in float64 on the same
# values; those of the self-check. A bf16 result is rounded once at least, by up to 4e-3.
BOUNDS = {"fp32": check.TOLERANCE[torch.float32], "bf16": 3e-2}


def op_rows(device: Any, sizes: Sizes, tokens: int, width: int) -> Iterator[Row]:
    """Every op: each implementation that takes the call natively; what it errs by at most."""
    from mm.kernels.op import Op

    torch.backends.cuda.matmul.allow_tf32 = False
    for name, (op_name, call) in op_calls(device, sizes).items():
        op = Op.every[op_name]
        for precision, dtype in PRECISIONS.items():
            torch.manual_seed(0)
            given = call(tokens, dtype, width)
            picked, right = op.pick(*given), None
            for way in able(op, given, picked):
                row: Row = {"op": name, "precision": precision, "by": way}
                row["picked"] = "yes" if way == picked else ""
                try:
                    if right is None:
                        right = results_of(op, "reference", widened(given))
                    errors = errors_of(results_of(op, way, given), right)
                    worst = max(errors, key=lambda each: errors[each])
                    wrong = not errors[worst] <= BOUNDS[precision]
                    row |= {"worst": worst, "error": errors[worst], "results": len(errors)}
                    row["state"] = "WRONG" if wrong else "ok"
                except Exception as error:  # the others are compared
                    row["state"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                yield row
            right = None


def able(op: Any, given: tuple[Any, ...], picked: str) -> list[str]:
    """Implementations that take a call, the picked one first; the reference where it is picked."""
    found = [w for w, (_, why_not) in op.implementations.items() if why_not(*given) is None]
    return [picked, *(w for w in reversed(found) if w not in (picked, "reference"))]


def widened(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values in float64, so that the reference's own rounding is nothing."""

    def wide(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().double().requires_grad_(x.requires_grad)
        return type(x)(*map(wide, x)) if hasattr(x, "_fields") else x

    return tuple(map(wide, given))


def results_of(op: Any, way: str, given: tuple[Any, ...]) -> dict[str, Tensor]:
    """Outputs and the gradients of all arguments that have one, by name."""
    run = op.implementations[way][0]
    call = inspect.signature(op.implementations["reference"][0]).bind(*given)
    return dict(zip(*check.results(run, call), strict=True))


def errors_of(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each result, as the self-check measures it; inf where not finite."""
    if found.keys() != right.keys():
        raise ValueError(f"gives {', '.join(found)} instead of {', '.join(right)}")
    floor = 1e-3 * max(map(check.size, right.values()))
    errors = {name: check.distance(found[name], right[name], floor) for name in right}
    return {name: e if e < float("inf") else float("inf") for name, e in errors.items()}
