"""`mm explain`: a step of a run again, from the checkpoint before it, with everything looked at.

A run resumes bit by bit, so what it did at a step can be seen long after: which samples were in
the batch, what each of them cost, which layer the gradient came from, and how the steps beside it
differ.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.batch import Batch
from mm.data.batching.codebooks import flat_stream
from mm.errors import UserError
from mm.model.layer import Head, HeadOut
from mm.run import Run
from mm.specs import Encoded
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.engine.gradients import Gradients, unclip
from mm.trainer.log import metrics as metrics_file
from mm.trainer.loop import Trainer
from mm.vocabulary import Vocabulary

log = logging.getLogger("mm.trainer")

BESIDE = 2  # steps before and after it that it is compared with
SHOWN = 8  # samples of the step that are decoded: those that cost most
FILE = "explain.json"


class _Enough(Exception):
    """All steps are seen."""


def explain(run: Run, step: int) -> dict[str, Any]:
    """Do ``step`` (from 1) of a run again; write and return ``explain/step_NNNNNN/explain.json``.

    Nothing else in the run folder changes. One process; a run of several gives their batch whole,
    with its noise drawn by one rank.

    Raises:
        UserError: the run has not come to that step, or no checkpoint is left before it.
    """
    rows = {row.get("step"): row for row in metrics_file.read(run.folder / "metrics.jsonl")}
    if step not in rows:
        newest = max((s for s in rows if isinstance(s, int)), default=0)
        raise UserError(f"{run.folder}: has no step {step}; it has done {newest} steps")
    place = run.folder / "explain" / f"step_{step:06d}"
    shutil.rmtree(place, ignore_errors=True)
    try:
        begun = _copy(run, place / "replay", step)
        look = Look(step)
        change: dict[str, Any] = {"name": "replay", "out": place, "callbacks": (), "export": "last"}
        change["tracking"] = run.tracking.model_copy(update={"sinks": ()})
        change["guard"] = run.guard.model_copy(update={"spike": "off"})  # it is to be seen, here
        change["engine"] = run.engine.model_copy(update={"max_skips": 10**9})
        change["checkpoints"] = run.checkpoints.model_copy(update={"every": 0, "keep_best": False})
        change["stages"] = tuple(s.model_copy(update={"tasks": ()}) for s in run.stages)
        with contextlib.suppress(_Enough), _quietly():
            Trainer(run.model_copy(update=change), [look]).fit()
        told = look.result(rows) | {"run": run.name, "from_step": begun}
        told["samples"] = look.decode(place)
    finally:
        shutil.rmtree(place / "replay", ignore_errors=True)
    part = place / f"{FILE}.part"
    part.write_text(json.dumps(told, indent=1))
    part.replace(place / FILE)
    return told


def _copy(run: Run, folder: Path, step: int) -> int:
    """Put the newest checkpoint before the steps beside ``step`` into a folder; its step, or 0."""
    found = {}
    for path in (run.folder / "checkpoints").glob("step_*"):
        word = path.name.removeprefix("step_")
        if word.isdigit() and (path / checkpoint.MARK).is_file():
            found[int(word)] = path
    before = [s for s in found if s < step]
    folder.mkdir(parents=True)
    if not before:
        return 0  # everything is made anew, as it was at its start
    newest = max((s for s in before if s < step - BESIDE), default=max(before))
    target = folder / "checkpoints" / found[newest].name
    # Links of its files: no byte is copied, and what the replay may remove are its own names.
    shutil.copytree(found[newest], target, copy_function=_link)
    return newest


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copy2(source, target)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of the training: what it says was said when it ran."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class Look(Callback):
    """Sees the steps around one, and of that one everything."""

    def __init__(self, step: int):
        self.step = step
        self.steps: dict[int, dict[str, Any]] = {}
        self.batches: list[Batch] = []
        self.costs: list[dict[str, Any]] = []  # of each sample of the step
        self._norms: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._calls = 0
        self._words: Vocabulary | None = None
        self._tokenizers: Mapping[str, Any] = {}

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        now = trainer.step + 1
        if now < self.step - BESIDE:
            return
        engine = trainer.stage.engines["model"]
        self._norms, self._calls = {}, 0
        names = [name for name, _ in engine.trainable()]
        take = lambda name, grad: self._norms.update({name: grad.norm()})
        self._hooks.append(Gradients(engine, names, take))
        if now != self.step:
            return
        self.batches = list(batches)
        self._words, self._tokenizers = trainer.vocabulary, trainer.tokenizers
        for head in [m for m in engine.raw.modules() if isinstance(m, Head)][:1]:
            self._hooks.append(head.register_forward_hook(self._cost))

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        if name != "step":
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        if step >= self.step - BESIDE:
            clip = trainer.stage.engines["model"].grad_clip
            norm = metrics.get("optim/grad_norm", 0.0)
            factor = unclip(norm, clip) if math.isfinite(norm) else 1.0
            self.steps[step] = {
                "metrics": {k: v for k, v in metrics.items() if isinstance(v, (int, float))},
                "gradient": {k: factor * float(v) for k, v in self._norms.items()},
                "keys": [key for b in trainer.batches for key in b.keys],
            }
        if step >= min(self.step + BESIDE, trainer.steps):
            raise _Enough

    @torch.no_grad()
    def _cost(self, head: Any, given: tuple[Any, ...], out: HeadOut) -> None:
        """Sum the losses of a micro-batch by sample, and by modality of the target within it."""
        if out.nll is None or not head.training or self._calls >= len(self.batches):
            return
        batch, number = self.batches[self._calls], self._calls
        self._calls += 1
        places = batch.places["tokens"].long() if "tokens" in batch.places else given[2].cpu()
        nll = out.nll.float().cpu().numpy()
        document = batch.layout.fields.document.flatten()[places].numpy()
        kept = batch.weight.flatten()[places].numpy() > 0
        kinds = batch.labels.get("target_modality")
        kind = kinds.flatten()[places].numpy() if kinds is not None else np.zeros_like(document)
        names = ("control", *(self._words.modalities if self._words is not None else ()))
        n = int(batch.layout.fields.document.max())
        for d in range(1, n + 1):
            mine = (document == d) & kept
            if not mine.any():
                continue
            by = {}
            for m in np.unique(kind[mine]):
                each = nll[mine & (kind == m)]
                by[names[m]] = {"loss": float(each.mean()), "targets": len(each)}
            named = batch.keys[d - 1] if len(batch.keys) == n else f"document {d}"
            self.costs.append(
                {
                    "key": named,
                    "micro_batch": number,
                    "document": d,
                    "loss": float(nll[mine].mean()),
                    "sum": float(nll[mine].sum()),
                    "targets": int(mine.sum()),
                    "by_modality": by,
                }
            )
        # Worst first; what is not finite is the worst of all.
        self.costs.sort(key=lambda c: (math.isfinite(c["loss"]), -c["loss"]))

    def result(self, rows: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
        """The step beside its neighbours; ``rows``: of the run's metrics.jsonl, by step."""
        if self.step not in self.steps:
            raise UserError(f"the replay did not come to step {self.step}")
        was, now = rows[self.step].get("loss/total"), self.steps[self.step]["metrics"]
        again = now.get("loss/total", math.nan)
        same = was == again or (was is None and not math.isfinite(again))
        beside = [s for n, s in self.steps.items() if n != self.step]
        return {
            "step": self.step,
            "loss_then": was,
            "loss_now": again if math.isfinite(again) else None,
            "same_bits": same,
            "metrics": _compare(now, [s["metrics"] for s in beside]),
            "gradient": _compare(
                _by_layer(self.steps[self.step]["gradient"]),
                [_by_layer(s["gradient"]) for s in beside],
            ),
            "losses": {
                str(n): {k: _number(v) for k, v in s["metrics"].items() if k.startswith("loss/")}
                for n, s in sorted(self.steps.items())
            },
        }

    def decode(self, place: Path) -> list[dict[str, Any]]:
        """Costs of all samples; what the dearest hold is written below ``place`` and named."""
        for i, cost in enumerate(self.costs[:SHOWN]):
            batch = self.batches[cost["micro_batch"]]
            cost["parts"] = self._parts(batch, cost["document"], place, f"{i:02d}")
        return [{k: _number(v) for k, v in cost.items()} for cost in self.costs]

    def _parts(self, batch: Batch, document: int, place: Path, name: str) -> list[dict[str, Any]]:
        from mm.decoders.media import save_media

        words, out = self._words, list[dict[str, Any]]()
        if words is None or batch.ids is None:
            return out
        own = batch.layout.fields.document == document
        ids = flat_stream(batch.ids[own].numpy(), words)
        for modality, codes in _runs(ids, words):
            tokenizer = self._tokenizers.get(modality)
            part: dict[str, Any] = {"modality": modality, "tokens": len(codes)}
            try:
                assert tokenizer is not None
                (raw,) = tokenizer.decode([Encoded(codes)])
            except Exception as error:  # a cut span: say so, show the rest
                part["note"] = f"not decoded: {type(error).__name__}: {str(error)[:100]}"
                out.append(part)
                continue
            if isinstance(raw, (str, bytes)):
                part["text"] = raw if isinstance(raw, str) else raw.decode("utf-8", "replace")
            else:
                part["file"] = save_media(raw, place / f"{name}_{len(out)}_{modality}").name
            out.append(part)
        return out


def _runs(ids: np.ndarray, words: Vocabulary) -> list[tuple[str, np.ndarray]]:
    """Codes of each span of a document, by modality; control tokens, begins and ends left out."""
    out: list[tuple[str, np.ndarray]] = []
    numbers = words.modality_of(ids)
    borders = np.flatnonzero(np.diff(numbers)) + 1
    for piece, kind in zip(np.split(ids, borders), np.split(numbers, borders), strict=True):
        if not len(piece) or kind[0] == 0:
            continue
        name = words.modalities[kind[0] - 1]
        span = words.range(name)
        # Two spans of one modality may stand side by side: a begin parts them.
        for part in np.split(piece, np.flatnonzero(piece == span.begin)):
            codes = part[(part >= span.first) & (part < span.stop)] - span.first
            if len(codes):
                out.append((name, codes.astype(np.int32)))
    return out


def _by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """Norms of parameters to norms of the modules two or three names deep that hold them."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        words = name.split(".")
        depth = 3 if any(w.isdigit() for w in words[:3]) else 1
        key = ".".join(words[:depth])
        squares[key] = squares.get(key, 0.0) + norm * norm
    return {k: math.sqrt(v) for k, v in squares.items()}


def _compare(
    now: Mapping[str, float], beside: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float | None]]:
    """Each figure, the mean of its neighbours' and their ratio; the greatest change first."""
    out: dict[str, dict[str, float | None]] = {}
    for name, value in now.items():
        others = [s[name] for s in beside if name in s and math.isfinite(s[name])]
        mean = sum(others) / len(others) if others else math.nan
        ratio = value / mean if mean else math.nan
        row = {"step": value, "beside": mean, "ratio": ratio}
        out[name] = {k: _number(v) for k, v in row.items()}
    size = lambda row: abs(math.log(row["ratio"])) if (row["ratio"] or 0) > 0 else 0.0
    return dict(sorted(out.items(), key=lambda item: (_finite(item[1]), -size(item[1]))))


def _finite(row: Mapping[str, float | None]) -> bool:
    return row["step"] is not None


def _number(value: Any) -> Any:
    """JSON has no number for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
