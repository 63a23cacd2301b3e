"""Samples: the same prompts or items every N steps, as files and tracker media."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn

from mm.batch import Batch, Values
from mm.config import Config
from mm.data.modalities.base import BadSample, raw_modality, table
from mm.decoders.base import is_fixed
from mm.errors import UserError
from mm.registry import CALLBACKS
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.ranks import main_alone

log = logging.getLogger("mm.trainer")


@CALLBACKS.register("samples")
class SamplesConfig(Config):
    """``prompts: [{text: "seven", to: image}]``; tokenizer runs need none."""

    kind: Literal["samples"] = "samples"
    every: Annotated[int, Field(gt=0, description="steps")] = 250
    at_start: Annotated[
        bool, Field(description="also before the first step: of what the run begins with")
    ] = False
    prompts: Annotated[
        tuple[dict[str, str], ...],
        Field(description="modality: value (text as it is, else a file) in order, and `to`"),
    ] = ()
    items: Annotated[int, Field(gt=0, description="reconstructions of a tokenizer run")] = 4
    temperature: Annotated[float, Field(ge=0, description="0 = greedy")] = 0.7
    top_k: Annotated[int, Field(ge=0, description="keep the k likeliest ids; 0 = off")] = 0
    top_p: Annotated[
        float,
        Field(gt=0, le=1, description="keep the likeliest ids up to this probability; 1 = off"),
    ] = 1.0
    cfg_scale: Annotated[float, Field(ge=0, description="classifier-free guidance; 1 = off")] = 1.0
    max_tokens: Annotated[int, Field(gt=0, description="ids of a span whose length is free")] = 64
    seed: Annotated[int, Field(description="of the noise")] = 0

    @model_validator(mode="after")
    def _each_says_where_to(self) -> SamplesConfig:
        for prompt in self.prompts:
            if "to" not in prompt:
                raise ValueError(f"prompt {prompt} needs 'to': the modality to generate")
        return self

    @classmethod
    def smallest(cls) -> SamplesConfig:
        return cls(every=250, prompts=({"text": "a cat", "to": "image"},))

    def build(self) -> Samples:
        return Samples(self)


class Made(NamedTuple):
    """One sample: the number of its prompt or item, its name, what was asked and what came."""

    number: int
    name: str
    prompt: Mapping[str, Any]  # modality -> raw value
    to: str
    value: Any


class Samples(Callback):
    """Writes ``samples/step_NNNNNN/NN_<name>.{png,wav,txt}`` and what they are.

    ``samples/index.jsonl`` says it, a line a sample: ``step``, ``number``, ``prompt`` (modality ->
    the words themselves, or ``{"file": ...}``), ``to`` and ``file``; files are named from
    ``samples/``, those of prompts lie in ``samples/prompts/``. The tracker gets one table a step.
    """

    def __init__(self, config: SamplesConfig):
        self.config = config
        self._kept: dict[str, torch.Tensor] | None = None
        self._done = -1

    def check(self, trainer: Training) -> None:
        """Encode every prompt: its modalities, tokenizers, files and lengths must all be there."""
        from mm.decoders.generate import Generator
        from mm.decoders.prompts import prepare

        known = trainer.vocabulary.modalities if trainer.vocabulary is not None else ()
        for prompt in self.config.prompts:
            said, to = f"callbacks.samples: prompt {prompt}", prompt["to"]
            for modality in {*prompt} - {"to"} | {to}:
                if modality not in known:
                    raise UserError(
                        f"{said} names '{modality}'; there is only "
                        f"{', '.join(known) or 'none (set vocabulary:)'}"
                    )
                if modality not in trainer.run.tokenizers:
                    raise UserError(
                        f"{said}: no tokenizer of '{modality}': set tokenizers.{modality}"
                    )
            assert trainer.vocabulary is not None  # it knows the modalities
            raw = {m: _raw(m, v) for m, v in prompt.items() if m != "to"}
            generator = Generator(nn.Identity(), trainer.vocabulary, trainer.tokenizers)
            try:
                (segments,) = generator.segments([raw], to)
                prepare(segments, to, trainer.vocabulary, self._limit(generator, to), "it")
            except UserError as error:
                raise UserError(f"{said}: {error}") from error

    def _limit(self, generator: Any, to: str) -> int | None:
        """Most new ids of a span; a grid has its own."""
        fixed = is_fixed(generator.vocabulary.spec(to)) is not None
        return None if fixed else self.config.max_tokens

    def on_stage_start(self, trainer: Training) -> None:
        if self.config.at_start and self.config.prompts and trainer.step == 0:
            self._sample(trainer, 0)

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        if self._kept is None and not self.config.prompts:
            self._kept = _items(trainer.batches, self.config.items)
        if step % self.config.every == 0 or step == trainer.steps:
            self._sample(trainer, step)

    def _sample(self, trainer: Training, step: int) -> None:
        self._done = step
        with trainer.unsharded() as module, main_alone() as mine:
            if not mine:
                return
            if self.config.prompts:
                made = self._generate(trainer, module)
            else:
                made = _reconstruct(module, self._kept or {}, trainer.device)
        _write(trainer, made, step)

    def _generate(self, trainer: Training, module: nn.Module) -> list[Made]:
        from mm.decoders.generate import Generator

        c = self.config
        assert trainer.vocabulary is not None  # `check` asked for it
        generator = Generator(module, trainer.vocabulary, trainer.tokenizers)
        out: list[Made] = []
        for to in dict.fromkeys(p["to"] for p in c.prompts):
            at = [i for i, p in enumerate(c.prompts) if p["to"] == to]
            try:
                raw = [{m: _raw(m, v) for m, v in c.prompts[i].items() if m != "to"} for i in at]
                values = generator.generate(
                    raw,
                    to=to,
                    temperature=c.temperature,
                    top_k=c.top_k,
                    top_p=c.top_p,
                    seed=c.seed,
                    cfg_scale=c.cfg_scale,
                    max_tokens=self._limit(generator, to),
                )
            except UserError as error:  # samples never end a run, nor does a file that is gone
                log.warning("samples to %s: %s", to, error)
                continue
            view = raw_modality(to).view
            out += [
                Made(i, _name(c.prompts[i]), prompt, to, view(value))
                for i, prompt, value in zip(at, raw, values, strict=True)
            ]
        return sorted(out, key=lambda one: one.number)


def _name(prompt: dict[str, str]) -> str:
    given = "_".join(
        f"{m}-{v if raw_modality(m).is_text else Path(v).stem}"
        for m, v in prompt.items()
        if m != "to"
    )
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{given or 'nothing'}_to_{prompt['to']}")[:60].strip(
        "-"
    )


def _raw(modality: str, value: str) -> Any:
    """A prompt's value: text as it is, bytes as UTF-8, else the path of a sound file."""
    own = raw_modality(modality)
    if own.is_text:
        return value if modality == own.kind else value.encode()
    try:
        own.check(Path(value).read_bytes())
        return Path(value)
    except (OSError, BadSample) as error:
        raise UserError(f"callbacks.samples: prompt file {value}: {error}") from error


def _items(batches: Sequence[Batch], n: int) -> dict[str, torch.Tensor]:
    """The first items of a tokenizer run's batch: modality -> (n, ...) data, and ``length``."""
    for modality, values in batches[0].values.items() if batches else ():
        return {modality: values.data[:n].clone(), "length": values.length[:n].clone()}
    return {}


def _reconstruct(
    module: nn.Module, kept: dict[str, torch.Tensor], device: torch.device
) -> list[Made]:
    """What a tokenizer network makes of the kept items: the original is the prompt."""
    for modality, data in kept.items():
        own = table().modalities.get(modality)
        if own is None or not own.reconstruction:
            continue
        batch = Batch.of_values({modality: Values.items(data, kept["length"])}).to(device)
        with torch.no_grad():
            out = module(batch, return_intermediates=frozenset({own.reconstruction}))
        again = out.intermediates[own.reconstruction].float().cpu()
        rate = getattr(
            module, "sample_rate", getattr(getattr(module, "config", None), "sample_rate", 16000)
        )
        made = []
        for i, (a, b, n) in enumerate(zip(data, again, kept["length"].tolist(), strict=True)):
            original, new = (own.from_network(x, n, int(rate)) for x in (a, b))
            made.append(Made(i, f"{modality}{i}", {modality: original}, modality, new))
        return made
    return []


def _write(trainer: Training, made: Sequence[Made], step: int) -> None:
    """Files, lines of the index and a table of the tracker."""
    from mm.decoders.media import save_media

    root = trainer.folder / "samples"
    lines, rows = [], []
    for one in made:
        file = save_media(one.value, root / f"step_{step:06d}" / f"{one.number:02d}_{one.name}")
        prompt: dict[str, Any] = {}
        row: dict[str, Any] = {"step": step}
        for modality, value in one.prompt.items():
            if raw_modality(modality).is_text:
                row[f"prompt {modality}"] = prompt[modality] = _words(value)
                continue
            if isinstance(value, Path):
                value = raw_modality(modality).decode(value.read_bytes())
            # The same at every step; written again, it is right after a change of the config, too.
            given = save_media(value, root / "prompts" / f"{one.number:02d}_{modality}")
            prompt[modality] = {"file": given.relative_to(root).as_posix()}
            row[f"prompt {modality}"] = given
        line = {"step": step, "number": one.number, "prompt": prompt, "to": one.to}
        lines.append(line | {"file": file.relative_to(root).as_posix()})
        rows.append(row | {f"sample {one.to}": file})
    if lines:
        _append(root / "index.jsonl", lines, step)
        trainer.tracker.table("samples", rows, step)


def _append(file: Path, lines: Sequence[Mapping[str, Any]], step: int) -> None:
    """Add lines to the index; older ones of this step and of later ones go: a resume makes them."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # cut by a kill
            continue
    text = "".join(f"{line}\n" for line in (*kept, *map(json.dumps, lines)))
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _words(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
