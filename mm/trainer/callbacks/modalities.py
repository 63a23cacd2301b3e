"""Modalities: what each of them gets and gives besides its loss, every few steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Batch
from mm.config import Config
from mm.model.layer import Embedder, Head, HeadOut
from mm.registry import CALLBACKS
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.engine.gradients import Gradients, unclip
from mm.trainer.log.metrics import all_reduce
from mm.vocabulary import Vocabulary


@CALLBACKS.register("modalities")
class ModalitiesConfig(Config):
    """Always on; name it in a run only to change it."""

    kind: Literal["modalities"] = "modalities"
    every: Annotated[int, Field(gt=0, description="steps between these figures")] = 50
    places: Annotated[
        int, Field(gt=0, description="of a micro-batch whose next token is guessed")
    ] = 512

    def build(self) -> Modalities:
        return Modalities(self)


class Modalities(Callback):
    """Adds figures by modality to the metrics of every `every`-th step.

    ``accuracy/<m>``: share of targets that the head ranks first, over at most ``places`` of each
    micro-batch. ``grad/<m>_embedding`` and ``grad/<m>_head``: norm of the gradient, before it is
    clipped, in the rows of its range (one figure, ``_embedding``, where they share a table).
    ``targets/<m>_wanted``: the share that ``data.modality_tokens`` asks for.
    """

    adds_metrics = True

    def __init__(self, config: ModalitiesConfig):
        self.config = config
        self._sums: Tensor | None = None  # (2, modalities + 1): right, and asked
        self._norms: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._inside = False

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        self._leave()
        words = trainer.vocabulary
        step = trainer.step + 1
        if words is None or (step % self.config.every and step != 1):
            return
        module = trainer.stage.engines["model"].raw
        self._sums = torch.zeros(2, len(words.modalities) + 1, device=trainer.device)
        borders = [words.range(m) for m in words.modalities]
        starts = torch.tensor([r.begin for r in borders], device=trainer.device)
        for head in (m for m in module.modules() if isinstance(m, Head)):
            guess = lambda head, given, out: self._guess(head, given, out, starts)
            self._hooks.append(head.register_forward_hook(guess))
        self._norms, engine = {}, trainer.stage.engines["model"]
        tables = tables_of(engine.raw, words.size)
        take = lambda name, grad: self._take(tables[name], grad, words)
        self._hooks.append(Gradients(engine, tables, take))

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        if name != "step":  # a held-out loss is none of its business
            self._leave()

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        words, counted, self._sums = trainer.vocabulary, self._sums, None
        if words is None or counted is None:
            return
        (sums,) = all_reduce([counted])
        right, asked = sums.tolist()
        for i, name in enumerate(words.modalities, start=1):
            if asked[i]:
                metrics[f"accuracy/{name}"] = right[i] / asked[i]
        if self._norms:
            values = torch.stack(list(self._norms.values())).tolist()
            clip = trainer.stage.engines["model"].grad_clip
            factor = unclip(metrics["optim/grad_norm"], clip)
            metrics |= {k: factor * v for k, v in zip(self._norms, values, strict=True)}
        wanted = getattr(trainer.stage.config.data, "modality_tokens", None) or {}
        fixed = {k: v for k, v in wanted.items() if isinstance(v, (int, float))}
        if fixed and len(fixed) == len(wanted):
            total = sum(fixed.values())
            metrics |= {f"targets/{k}_wanted": v / total for k, v in fixed.items() if total}

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _guess(self, head: nn.Module, given: tuple[Any, ...], out: HeadOut, starts: Tensor) -> None:
        """Count the right guesses of a head that was given targets; ``starts`` (M,) of ranges."""
        if self._inside or not torch.is_tensor(out.nll) or not head.training or len(given) < 4:
            return
        h, ctx, places, target = given[:4]
        if not torch.is_tensor(target) or self._sums is None:
            return
        n = len(places)
        step = max(1, n // self.config.places)
        few, ids = places[::step], target[::step]
        ids = (ids if ids.dim() == 1 else ids[:, getattr(head, "stream", 0)]).long()
        self._inside = True
        try:
            dist = head(h.detach(), ctx, few).dist
        finally:
            self._inside = False
        if dist is None or dist.logits is None or not n:
            return
        right = (dist.logits.argmax(-1) == ids).float()
        known = torch.bucketize(ids, starts, right=True)  # 0: control tokens
        self._sums[0].index_add_(0, known, right)
        self._sums[1].index_add_(0, known, torch.ones_like(right))

    def _take(self, suffix: str, grad: Tensor, words: Vocabulary) -> None:
        """Keep the norms of the ranges' rows of a table's gradient (N, D)."""
        rows = grad.norm(dim=1)
        for name in words.modalities:
            span = words.range(name)
            self._norms[f"grad/{name}_{suffix}"] = rows[span.begin : span.stop].norm()


def tables_of(module: nn.Module, n_ids: int) -> dict[str, str]:
    """Names of the parameters with a row for each id: "embedding" or "head"; a shared one once."""
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    out: dict[str, str] = {}
    for kind, suffix in ((Embedder, "embedding"), (Head, "head")):
        for part in (m for m in module.modules() if isinstance(m, kind)):
            weight: Any = getattr(part, "weight", None)
            shape = getattr(weight, "ds_shape", getattr(weight, "shape", (0,)))
            if id(weight) in names and shape[0] >= n_ids:
                out.setdefault(names[id(weight)], suffix)
    return out
