"""Speed, memory and growth of mixers over length. T tokens, D model."""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.bench.memory import available_mib, peak_mib
from mm.errors import UserError
from mm.kernels.op import Op
from mm.layout import Doc, Layout
from mm.mask import Causal, Full
from mm.model.backbones.stack import StackConfig, presets
from mm.model.context import Ctx, Memory
from mm.model.layer import Layer, init_weights
from mm.model.memories import memories_read
from mm.registry import LINEARS, MIXERS

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
DECODE_AT = (1024, 32768)
STEPS = 16  # timed decoding steps
PATIENCE_S = 15.0  # a run that takes longer is not repeated
PREFILL = 512  # tokens a call
AWKWARD = (1, 3, 63, 64, 65, 130)  # lengths of the parity test, one row each, then packed
# What a mixer that cannot take a call raises; those of bounded length name their setting.
REFUSED = (UserError, ValueError, RuntimeError, NotImplementedError)
PARITY = 1e-3  # relative RMS error in float32, of outputs and of every gradient


class Row(NamedTuple):
    """One cell; None where nothing was measured, and then ``note`` says why."""

    mixer: str
    linear: str
    length: int
    tokens_per_second: float | None
    peak_mib: float | None
    growth_exponent: float | None
    decode_us: float | None
    state_bytes: int | None
    note: str


def names() -> list[str]:
    """Every registered mixer and every preset."""
    return sorted({*MIXERS, *presets()})


@dataclass
class Bench:
    """What is measured and with which patience."""

    lengths: Sequence[int] = LENGTHS
    d_model: int = 256
    linear: str = "dense"
    cell_s: float = 60.0  # a cell predicted to take longer is skipped
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def build(self, name: str) -> Layer:
        """The mixer ``name`` in training mode, float32, the same weights every time."""
        torch.manual_seed(0)
        config = StackConfig(pattern=name).mixer(name)
        layer = config.build(self.d_model, LINEARS.get(self.linear)().build)
        init_weights(layer)
        return layer.to(self.device)

    def decode_lengths(self) -> list[int]:
        """Lengths after which decoding is timed: 1k and 32k, or else the longest."""
        return [n for n in DECODE_AT if n in self.lengths] or [max(self.lengths)]

    def run(self, name: str, done: Callable[[], object] = lambda: None) -> list[Row]:
        """Measure one mixer; ``done`` is called after every length.

        A mixer that fails its parity test, or that cannot run, has rows without figures.
        """
        lengths = sorted(set(self.lengths))
        try:
            layer = self.build(name)
            fault = parity_fault(layer, self.d_model, self.device)
        except REFUSED as error:
            fault = f"does not run: {_line(error)}"
        if fault:
            for _ in lengths:
                done()
            empty = (None, None, None, None, None)
            return [Row(name, self.linear, n, *empty, fault) for n in lengths]
        seconds: dict[int, float] = {}
        peaks: dict[int, float | None] = {}
        notes: dict[int, str] = {}
        for n in lengths:
            notes[n] = self._too_much(n, seconds, peaks)
            if not notes[n]:
                try:
                    seconds[n], peaks[n] = self.cell(layer, n, warm=not seconds)
                except REFUSED as error:
                    notes[n] = f"fails: {_line(error)}"
            done()
        decode = {}
        for n in (n for n in self.decode_lengths() if n in seconds):
            try:
                decode[n] = self._decode(layer, n)
            except REFUSED as error:
                notes[n] = f"decoding fails: {_line(error)}"
        growth = exponent(seconds)
        rows = []
        for n in lengths:
            speed = n / seconds[n] if n in seconds else None
            us, size = decode.get(n, (None, None))
            rows.append(Row(name, self.linear, n, speed, peaks.get(n), growth, us, size, notes[n]))
        return rows

    def _too_much(self, n: int, seconds: dict[int, float], peaks: dict[int, float | None]) -> str:
        """Why a cell is skipped, from what the shorter ones took; empty when it is not."""
        if not seconds:
            return ""
        wanted = extrapolate(seconds, n)
        if wanted > self.cell_s:
            return f"skipped: predicted to take {wanted:.0f} s"
        known = {length: peak for length, peak in peaks.items() if peak}
        mib = extrapolate(known, n) if known else 0.0
        if mib > 0.8 * available_mib(self.device):
            return f"skipped: predicted to take {mib / 1024:.1f} GiB"
        return ""

    def cell(self, layer: Layer, n: int, warm: bool) -> tuple[float, float | None]:
        """Seconds (median of up to five) and peak MiB of forward and backward."""
        x = torch.randn(1, n, self.d_model, device=self.device, requires_grad=True)
        dy = torch.randn_like(x)
        ctx = _told(layer, Layout.plain(1, n), x, n)

        def work() -> None:
            torch.autograd.backward(layer(x, ctx).y, dy)
            x.grad = None
            layer.zero_grad(set_to_none=True)

        if warm:
            work()
        taken = []
        peak = peak_mib(lambda: taken.append(self._timed(work)), self.device)
        if taken[0] < PATIENCE_S:  # the first run of a length pays for its fresh memory
            taken.clear()
        while not taken or (len(taken) < 5 and sum(taken) < 1.0):
            taken.append(self._timed(work))
        return statistics.median(taken), peak

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds; on one CPU thread those in which it ran, so that a busy machine matters less."""
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        self._wait()
        start = clock()
        work()
        self._wait()
        return clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _decode(self, layer: Layer, n: int) -> tuple[float | None, int | None]:
        """Median microseconds of a token after ``n`` others, and bytes of the State there."""
        state = layer.initial_state(1, n + STEPS) if layer.caps.step else None
        if state is None:
            return None, None
        size, wanted = layer.state_bytes(1, n), memories_read(layer)

        def feed(at: int, count: int) -> None:
            nonlocal state
            layout = Layout.from_rows([[Doc(count, slot=0, fresh=at == 0, start=at)]])
            x = torch.randn(1, count, self.d_model, device=self.device)
            state = layer(x, _told(layer, layout, x, n, wanted), state).state

        with torch.no_grad():
            for at in range(0, n, PREFILL):
                feed(at, min(PREFILL, n - at))
            steps = [self._timed(lambda at=n + i: feed(at, 1)) for i in range(STEPS)]
        return 1e6 * statistics.median(steps), size


def _told(
    layer: Layer, layout: Layout, x: Tensor, size: int, wanted: Set[str] | None = None
) -> Ctx:
    """The mask that a layer is made for, and ``size`` vectors a document of what it attends to.

    ``wanted`` are the names of the latter, where they are known.
    """
    mask = Causal() if layer.caps.causal else Full()
    wanted = memories_read(layer) if wanted is None else wanted
    if not wanted or not layout.fresh.any():  # a State remembers it
        return Ctx(layout.to(x.device), mask)
    known, memories = layout.arrays(), {}
    docs = [
        Doc(size * bool(length), slot=slot)
        for length, slot in zip(known.length, layout.slot.tolist(), strict=True)
    ]
    for name in sorted(wanted):
        own = Layout.from_rows([docs], max_documents=len(docs))
        made = torch.randn(1, own.shape[1], x.shape[-1], generator=torch.Generator().manual_seed(0))
        memories[name] = Memory(own.to(x.device), Full(), made.to(x.device))
    return Ctx(layout.to(x.device), mask, memories=memories)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# ---- growth ----


def exponent(seconds: dict[int, float]) -> float | None:
    """Slope of log seconds over log length, least squares; None of fewer than two lengths."""
    if len(seconds) < 2:
        return None
    x, y = [math.log(n) for n in seconds], [math.log(s) for s in seconds.values()]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )


def extrapolate(known: dict[int, float], n: int) -> float:
    """What length ``n`` will take, by the slope of the last two lengths; one alone: quadratic."""
    *_, last = sorted(known)
    slope = 2.0
    if len(known) > 1:
        before = sorted(known)[-2]
        rise = math.log(max(known[last], 1e-9) / max(known[before], 1e-9))
        slope = min(max(rise / math.log(last / before), 1.0), 2.5)
    return known[last] * (n / last) ** slope


# ---- parity ----


def parity_fault(layer: Layer, d_model: int, device: torch.device) -> str:
    """What is wrong with the implementations that a layer's calls take; empty if nothing.

    Outputs and gradients are compared with all references, on lengths that divide nothing and on
    packed documents.
    """
    layouts = [Layout.plain(1, n) for n in AWKWARD]
    layouts.append(Layout.from_rows([[Doc(65), Doc(1), Doc(64)], [Doc(3), Doc(63)]]))
    for layout in layouts:
        g = torch.Generator().manual_seed(sum(layout.shape))
        x = torch.randn(*layout.shape, d_model, generator=g).to(device)
        dy = torch.randn(x.shape, generator=g).to(device)
        ctx = _told(layer, layout, x, max(AWKWARD))
        with references(set(Op.every) | _kernels()):
            expected = _results(layer, x, dy, ctx)
        if (error := _error(_results(layer, x, dy, ctx), expected)) <= PARITY:
            continue
        blame = "its backends together"
        for op in Op.every:
            with references({op}):
                if _error(_results(layer, x, dy, ctx), expected) <= PARITY:
                    others = [n for n in Op.every[op].implementations if n != "reference"]
                    blame = f"{op} ({', '.join(others)})"
                    break
        return f"parity fails at {tuple(layout.shape)}: {blame} is off by {error:.1e}"
    return ""


def _kernels() -> set[str]:
    """Names of all Ops, after importing every kernel."""
    import mm.kernels

    for folder in mm.kernels.__path__:
        for path in sorted(Path(folder).iterdir()):
            if (path / "__init__.py").is_file():
                importlib.import_module(f"mm.kernels.{path.name}")
    return set(Op.every)


@contextlib.contextmanager
def references(ops: set[str]) -> Iterator[None]:
    """Force the reference of these Ops."""
    with contextlib.ExitStack() as stack:
        for name in ops:
            stack.enter_context(Op.every[name].using("reference"))
        yield


def _results(layer: Layer, x: Tensor, dy: Tensor, ctx: Ctx) -> list[Tensor]:
    """Output, gradient of the input, gradients of all parameters."""
    x = x.detach().requires_grad_()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x, ctx).y
    wanted = [x, *parameters]
    found: Any = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    gradients = zip(found, wanted, strict=True)
    return [y.detach(), *(torch.zeros_like(w) if g is None else g for g, w in gradients)]


def _error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative RMS error; what is tiny beside the largest gradient counts by that one."""
    floor = 1e-3 * max(float(e.norm()) / e.numel() ** 0.5 for e in expected)
    worst = 0.0
    for a, e in zip(got, expected, strict=True):
        size = max(float(e.norm()) / e.numel() ** 0.5, floor, 1e-12)
        error = float((a - e).norm()) / e.numel() ** 0.5 / size
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


# ---- picture ----


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw tokens per second over length, log-log, one line a mixer, into ``file``."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.tokens_per_second is not None:
            lines.setdefault(row.mixer, []).append((row.length, row.tokens_per_second))
    growth = {row.mixer: row.growth_exponent for row in rows}
    ordered = sorted(lines, key=lambda name: -lines[name][-1][1])
    figure = Figure(figsize=(11, max(5.0, 0.2 * len(ordered) + 1)), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(ordered):
        x, y = zip(*lines[name], strict=True)
        said = f"{name} (T^{growth[name]:.2f})" if growth[name] is not None else name
        style = ("-", "--", "-.", ":")[i // 10 % 4]
        axes.plot(x, y, style, color=f"C{i % 10}", marker="o", markersize=3, label=said)
    axes.set(xscale="log", yscale="log", xlabel="tokens T", ylabel="tokens/s, forward + backward")
    axes.set_xscale("log", base=2)
    axes.grid(True, which="major", alpha=0.3)
    axes.set_title("Mixers over length (cost grows as T to the power in brackets)")
    if ordered:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
