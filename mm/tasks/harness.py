"""The language-model evaluation harness (`lm-eval`) over a model of ours, by its own interface."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm.decoders.books import documents_batch, require_one_book
from mm.decoders.generate import Generator
from mm.decoders.score import evaluating
from mm.errors import UserError
from mm.specs import Segment
from mm.tasks.bits_per_byte import windows

MAX_NEW = 256  # ids of an answer whose task names no limit


def language_model(
    generator: Generator, *, modality: str | None = None, max_tokens: int = 1024, batch: int = 16
) -> Any:
    """An `lm_eval.api.model.LM` that scores and continues text.

    A text begins as in training, with the mark of its span. A context that is too long loses its
    beginning; a rolling likelihood goes by windows whose first half is context alone.

    Args:
        modality: of text; default the model's only one that is written.
        max_tokens: ids of a context with its continuation.
        batch: texts of one forward.

    Raises:
        UserError: the package is not there, or the model writes no text.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            f"the harness needs the package '{error.name}': pip install 'mm-stack[harness]'"
        ) from error
    text = generator.modality(modality)
    scorer = Scorer(generator, text, max_tokens, batch)

    class HarnessModel(LM):
        """See `language_model`."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return scorer.continuations([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return scorer.whole([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [scorer.answer(*request.args) for request in requests]

    return HarnessModel()


class Scorer:
    """Log-likelihoods in nats, and greedy or sampled answers, of a model's text."""

    def __init__(self, generator: Generator, modality: str, max_tokens: int, batch: int):
        require_one_book(generator.model, modality, "the harness")
        self.generator, self.modality = generator, modality
        self.max_tokens, self.batch = max_tokens, batch

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of (context, continuation): nats of the continuation, and whether greedy writes it.

        Raises UserError where a continuation alone is longer than ``max_tokens``.
        """
        wholes = self.generator.encode(self.modality, [a + b for a, b in pairs])
        contexts = self.generator.encode(self.modality, [a for a, _ in pairs])
        spans = []
        for whole, context, (_, told) in zip(wholes, contexts, pairs, strict=True):
            n = min(len(context), len(whole))
            if len(whole) - n > self.max_tokens:
                raise UserError(
                    f"a continuation has {len(whole) - n} tokens, --max-tokens is "
                    f"{self.max_tokens}: '{told[:40]}'"
                )
            cut = max(0, len(whole) - self.max_tokens)
            targets = np.append(whole, -1)  # the end of the span is not told
            targets[:n] = -1
            spans.append(Segment(self.modality, whole[cut:], targets=targets[cut:]))
        return self._score(spans)

    def whole(self, texts: Sequence[str]) -> list[float]:
        """Nats of whole texts, each token once."""
        spec = self.generator.vocabulary.spec(self.modality)
        pieces, owner = [], []
        for i, ids in enumerate(self.generator.encode(self.modality, list(texts))):
            span = Segment(self.modality, ids, targets=np.append(ids, -1))
            for piece in windows(span, spec, self.max_tokens, 0.5):
                pieces.append(piece)
                owner.append(i)
        out = [0.0] * len(texts)
        for i, (nats, _) in zip(owner, self._score(pieces), strict=True):
            out[i] += nats
        return out

    @torch.no_grad()
    def _score(self, spans: Sequence[Segment]) -> list[tuple[float, bool]]:
        """Log-likelihood of the targets of each span, and whether each is the likeliest."""
        model, vocabulary = self.generator.model, self.generator.vocabulary
        device = next(model.parameters()).device
        out: list[tuple[float, bool]] = [(0.0, True)] * len(spans)
        order = sorted(range(len(spans)), key=lambda i: len(spans[i].ids))
        for at in range(0, len(order), self.batch):
            some = order[at : at + self.batch]
            b = documents_batch(model, vocabulary, [[spans[i]] for i in some])
            places = b.places["tokens"].long()
            if not len(places):
                continue
            with evaluating(model):
                found = model(b.to(device), heads=("tokens",), loss=False)
            logits = found.heads["tokens"].dist.logits.double().cpu()
            target = b.targets.flatten(0, 1)[places].reshape(len(places)).long()
            told = logits.log_softmax(-1).gather(1, target[:, None])[:, 0].numpy()
            best = (logits.argmax(-1) == target).numpy()
            row = (places // b.layout.shape[1]).numpy()
            for r, i in enumerate(some):
                mine = row == r
                out[i] = (float(told[mine].sum()), bool(best[mine].all()))
        return out

    def answer(self, context: str, settings: Mapping[str, Any]) -> str:
        """The continuation of a context, up to the first of ``settings["until"]``."""
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(settings.get("max_gen_toks", MAX_NEW))
        sampled = bool(settings.get("do_sample", False)) or settings.get("temperature", 0) > 0
        ids = self.generator.encode(self.modality, [context])[0]
        room = max(1, self.max_tokens - most)
        if len(ids) > room:
            context = self.generator.decode(self.modality, [ids[-room:]])[0]
        made = self.generator.generate(
            [{self.modality: context}],
            self.modality,
            max_tokens=most,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
        )[0]
        made = made.removeprefix(context)
        ends = [made.find(word) for word in until if word and word in made]
        return made[: min(ends)] if ends else made


def run(
    model: Any, tasks: Sequence[str], few_shot: int | None, limit: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run tasks of the harness.

    Args:
        tasks: names, or YAML files of tasks.
        few_shot: examples before each question; default the task's own.
        limit: questions of each task at most.

    Returns:
        Figures by task, and their standard errors. Raises UserError on an unknown task.
    """
    from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise UserError(f"no task file at {file}")
    manager = TaskManager(include_path=sorted({str(f.resolve().parent) for f in files}) or None)
    names = [_name(Path(t)) if Path(t) in files else t for t in tasks]
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise UserError(
                f"no task '{name}' in the harness; a YAML of your own: --harness FILE.yaml"
            )
    evaluate: Any = evaluator.simple_evaluate  # its decorator hides its arguments
    found = evaluate(
        model=model,
        tasks=list(names),
        num_fewshot=few_shot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert found is not None
    figures, errors = {}, {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            name = "/".join([task, metric, *([filter_name] if filter_name != "none" else [])])
            (errors if metric.endswith("_stderr") else figures)[name] = value
    return figures, errors


def _name(file: Path) -> str:
    """The task that a YAML of the harness names."""
    from mm.reading import parse_yaml

    try:
        values = parse_yaml(_without_tags(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(values, Mapping) or not isinstance(values.get("task"), str):
        raise UserError(f"{file}: no `task:` names it, as a YAML of the harness must")
    return values["task"]


def _without_tags(text: str) -> str:
    return text.replace("!function ", "")
