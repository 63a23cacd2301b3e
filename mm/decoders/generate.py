"""Any modality from any other: tokens (`generate_tokens`), raw values (`Generator`, `generate`)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm.data.batching.document import of_array
from mm.data.modalities.base import TEXT, table
from mm.decoders import rules as rule_kinds
from mm.decoders.base import Ask, Rule, is_fixed
from mm.decoders.books import delays_of, local_codes
from mm.decoders.folder import Tokenizers, load
from mm.decoders.media import save_media
from mm.decoders.prompts import (
    MAX_PROMPT_TOKENS,
    batch,
    check,
    continues,
    distinct,
    prepare,
    require_causal,
    require_short,
)
from mm.decoders.raws import (
    by_reader,
    expected_tokens,
    own_modality,
    parse_prompt,
    read_raw,
    unseen_words,
    writable_modalities,
)
from mm.decoders.score import evaluating, sequence_nll
from mm.errors import UserError, did_you_mean
from mm.registry import DECODERS
from mm.specs import Encoded, ModalityTokenizer, Segment
from mm.vocabulary import Vocabulary

__all__ = [
    "Generator",
    "generate",
    "generate_tokens",
    "save_media",
    "sequence_nll",
    "stream_tokens",
]

log = logging.getLogger(__name__)

MAX_SLOTS = 512  # sequences decoded together


def stream_tokens(
    model: nn.Module,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[Segment]],
    to: str,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_scale: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    rules: Sequence[Rule] = (),
    decoder: Any = "ar",
    repeats: int = 1,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
) -> Iterator[Tensor]:
    """Generate one span of modality ``to`` for each prompt, step by step.

    Arguments as for `generate_tokens`, yields as `Decoder.run`; the span's end is included.
    """
    require_causal(model, vocabulary, to)
    ask_rules = rule_kinds.sampling(temperature, top_k, top_p, cfg_scale, rules)
    delays = delays_of(model)
    ready = [
        prepare(p, to, vocabulary, max_tokens, f"prompt {i}", repeats, delays)
        for i, p in enumerate(prompts)
    ]
    for i, p in enumerate(ready):
        require_short(p.tokens.n_tokens, max_prompt_tokens, f"prompt {i}")
    if not ready:
        return
    N = len(ready)
    streams, rows = distinct([p.tokens for p in ready] + [p.null for p in ready] * (cfg_scale != 1))
    ask = Ask(
        vocabulary,
        to,
        rows[:N],
        np.array([p.have for p in ready]),
        np.array([p.limit for p in ready]),
        rows[N:] if cfg_scale != 1 else None,
        cfg_scale,
        temperature == 0,
        seed,
        indices,
        delays.get(to, ()),
        np.array([p.known for p in ready]) if to in delays else None,
    )
    device = next(model.parameters()).device
    run = DECODERS.parse(decoder).build().run
    with evaluating(model):
        yield from run({"model": model}, batch(streams, vocabulary).to(device), ask, ask_rules)


def generate_tokens(
    model: nn.Module,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[Segment]],
    to: str,
    *,
    indices: Sequence[int] | None = None,
    max_slots: int = MAX_SLOTS,
    **settings: Any,
) -> list[np.ndarray]:
    """Generate one span of modality ``to`` for each prompt.

    Args:
        model: a language model of ``vocabulary``.
        prompts: segments of each sequence. A last segment of modality ``to`` with role "target" is
            continued; all others are conditions; none at all asks unconditionally.
        indices: number of each sequence in the noise; default 0, 1, 2, ... A sequence depends on
            (seed, its index, its prompt) alone, not on what shares its batch.
        max_slots: sequences decoded together; bounds memory.
        **settings: `temperature` (0 = greedy), `top_k` (0 = off), `top_p`, `cfg_scale` (1 = no
            guidance; uncond + scale * (cond - uncond) on the logits), `max_tokens` (new ids of a
            span without a grid), `seed`, `rules` (applied after the span grammar), `decoder` (kind
            or config of the DECODERS registry), `repeats` (2 = conditions are read twice),
            `max_prompt_tokens` (longer prompts are refused: attention takes memory of their
            square).
    Returns:
        Local ids `(L,)` int32 of each span, a continued prefix included.
    Raises:
        UserError: an unfinished or impossible prompt, a bad setting, or a model whose logits are
            not finite.
    Source: guidance: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, on logits; repeats: Arora et
    al. 2024 (arXiv:2407.05483), JRT-Prompt.
    """
    numbers = list(range(len(prompts))) if indices is None else list(indices)
    target = vocabulary.range(to)
    spans: list[np.ndarray] = []
    for at in range(0, len(prompts), max_slots):
        some = prompts[at : at + max_slots]
        steps = list(
            stream_tokens(
                model, vocabulary, some, to, indices=numbers[at : at + max_slots], **settings
            )
        )
        ids = torch.stack(steps, 1).numpy()
        for segments, row in zip(some, ids, strict=True):
            continued = segments[-1].ids if continues(segments, to) else ()
            spans.append(local_codes(row, continued, target, delays_of(model).get(to, ())))
    return spans


SETTINGS = {
    name
    for function in (stream_tokens, generate_tokens)
    for name, p in inspect.signature(function).parameters.items()
    if p.kind is p.KEYWORD_ONLY
}


class Generator:
    """A model with its vocabulary and tokenizers: raw values in, raw values out."""

    def __init__(
        self,
        model: nn.Module,
        vocabulary: Vocabulary,
        tokenizers: Mapping[str, ModalityTokenizer],
        moved: Sequence[str] | None = None,
    ):
        """``moved``: conditions that a second sequence of the model takes; default all of them."""
        self.model, self.vocabulary, self.tokenizers = model, vocabulary, tokenizers
        self.moved = moved

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", *, trust_code: bool = False
    ) -> Generator:
        """Load a saved model, or a run folder's `model/`, else its newest good checkpoint.

        Args:
            trust_code: import what the config of a run's folder names under `imports:`.
        Raises:
            UserError: nothing there, the folder lacks its vocabulary, or asks to run code.
        """
        loaded = load(folder, trust_code)
        tokenizers = Tokenizers(loaded.tokenizers, loaded.vocabulary)
        model = loaded.model.to(device).eval()
        return cls(model, loaded.vocabulary, tokenizers, loaded.moved)

    def tokenizer(self, modality: str) -> ModalityTokenizer:
        """Tokenizer of a modality. Raises UserError when the vocabulary or the folder has none."""
        self.vocabulary.spec(modality)
        if modality not in self.tokenizers:
            raise UserError(
                f"no tokenizer for '{modality}' beside the model"
                f"{did_you_mean(modality, self.tokenizers)}"
            )
        return self.tokenizers[modality]

    def modality(self, name: str | None = None) -> str:
        """The model's modality that a name means; without one, the only one there is.

        Raises UserError, naming those that there are.
        """
        if name is not None:
            return own_modality(name, self.vocabulary.modalities)
        heads = getattr(self.model, "heads", ())
        known = writable_modalities(self.vocabulary.ranges, self.tokenizers, heads)
        if len(known) == 1:
            return known[0]
        choices = ", ".join(known) or "none: there is no tokenizer beside the model"
        raise UserError(f"say which modality to generate; this model has: {choices}")

    def encode(
        self, modality: str, raws: Sequence[Any], *, max_items: int = 256
    ) -> list[np.ndarray]:
        """Local ids `(L,)` of raw values of one modality; every distinct str is encoded once.

        Of a continuous modality its values, `(L, C)` or a grid of them.

        A value may also be a file's path, or what else `mm.decoders.raws.read_raw` takes.
        """
        tokenizer = self.tokenizer(modality)
        raws = [read_raw(modality, raw, tokenizer) for raw in raws]
        strings = all(isinstance(raw, str) for raw in raws)
        todo = list(dict.fromkeys(raws)) if strings else list(raws)
        ids: list[np.ndarray] = []
        for at in range(0, len(todo), max_items):
            ids += [
                np.asarray(e.ids, np.int32) if e.values is None else np.asarray(e.values)
                for e in tokenizer.encode(todo[at : at + max_items])
            ]
        if not strings:
            return ids
        known = dict(zip(todo, ids, strict=True))
        return [known[raw] for raw in raws]

    def decode(
        self, modality: str, spans: Sequence[np.ndarray], *, max_items: int = 256
    ) -> list[Any]:
        """Raw values of local ids."""
        tokenizer, out = self.tokenizer(modality), []
        for at in range(0, len(spans), max_items):
            out += tokenizer.decode([Encoded(ids) for ids in spans[at : at + max_items]])
        return out

    def segments(
        self,
        prompts: Sequence[Mapping[str, Any]],
        to: str,
        *,
        max_tokens: int = MAX_PROMPT_TOKENS,
    ) -> list[list[Segment]]:
        """Raw prompts to segments; a last value of modality ``to`` without a grid is continued.

        ``max_tokens``: recordings that make more are refused before they are encoded.
        """
        to = self.modality(to)
        prompts = [{self.modality(m): raw for m, raw in prompt.items()} for prompt in prompts]
        raws: dict[str, list[Any]] = {}
        for prompt in prompts:
            for modality, raw in prompt.items():
                raw = read_raw(modality, raw, self.tokenizer(modality))
                require_short(
                    expected_tokens(self.vocabulary.spec(modality), raw), max_tokens, modality
                )
                raws.setdefault(modality, []).append(raw)
        ids = {modality: iter(self.encode(modality, values)) for modality, values in raws.items()}
        free = is_fixed(self.vocabulary.spec(to)) is None
        out = []
        for prompt in prompts:
            line = [of_array(self.vocabulary.spec(m), next(ids[m])) for m in prompt]
            line = [segment._replace(role="condition") for segment in line]
            if line and line[-1].modality == to and free:
                line[-1] = line[-1]._replace(role="target")
            out.append(self.in_parts(line, to))
        return out

    def in_parts(self, segments: list[Segment], to: str) -> list[Segment]:
        """Conditions where the model reads them: in its second sequence, if it has one.

        Raises UserError of a model with several, as none is known to be meant.
        """
        names = getattr(getattr(self.model, "config", None), "parts", ())
        if not names:
            return segments
        if len(names) > 1:
            raise UserError(
                f"the model reads {len(names)} second sequences ({', '.join(names)}): give "
                "generate_tokens segments whose part is named"
            )
        moves = lambda s: s.role == "condition" and (self.moved is None or s.modality in self.moved)
        given = segments or [Segment(to, role="condition")]
        return [s._replace(part=names[0]) if moves(s) else s for s in given]

    def generate(self, prompts: Sequence[Mapping[str, Any]], to: str, **settings: Any) -> list[Any]:
        """Generate one raw value of modality ``to`` for each prompt.

        Args:
            prompts: modality -> raw value (str, uint8 image `(H, W, 3)`, Waveform) or the path of
                its file, conditions in the given order; an empty one asks unconditionally. A last
                text prompt with ``to="text"`` is continued (and comes back with its continuation).
            **settings: see `generate_tokens`.
        Raises:
            UserError: an unknown modality, a missing tokenizer, or what `generate_tokens` refuses.
        """
        if isinstance(prompts, Mapping):
            raise UserError("prompts must be a list of prompts: generate([{'text': ...}], to=...)")
        own = self.modality(to)
        most = settings.get("max_prompt_tokens", MAX_PROMPT_TOKENS)
        segments = self.segments(prompts, own, max_tokens=most)
        spans = generate_tokens(self.model, self.vocabulary, segments, own, **settings)
        values = self.decode(own, spans)
        if to == TEXT != own:  # of a model of bytes
            return [value.decode("utf-8", "replace") for value in values]
        return values

    def unseen(self, prompts: Sequence[Mapping[str, Any]]) -> str:
        """A sentence on words of the prompts that the text tokenizer never met; "" without any."""
        own = [{self.modality(m): raw for m, raw in prompt.items()} for prompt in prompts]
        words = unseen_words(own, self.tokenizers)
        shown = ", ".join(f"'{w[:40]}'" for w in words[:8]) + (" ..." if len(words) > 8 else "")
        met = "never seen in the text that the tokenizer was trained on"
        return f"{met}: {shown}; the model can but guess" if words else ""

    def nll(
        self, documents: Sequence[Sequence[Segment]], **kw: Any
    ) -> list[dict[str, tuple[float, int]]]:
        """See `sequence_nll`. Raises UserError on an unfinished span."""
        for i, document in enumerate(documents):
            for segment in document:
                if segment.ids is not None:
                    check(segment, self.vocabulary, whole=True, origin=f"document {i}")
        return sequence_nll(self.model, self.vocabulary, documents, **kw)


def generate(
    source: str | Path | Generator,
    prompt: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    to: str | None = None,
    trust_code: bool = False,
    **settings: Any,
) -> Any:
    """Generate from a run folder, a saved model or a ready `Generator`.

    ``generate(run, "seven", to="image")``, ``generate(run, image="seven.png", to="text")``,
    ``generate(run, audio=(samples, 16000), to="text")``.

    Args:
        source: folder or Generator; loading takes longer than generating, so keep a Generator for
            many calls.
        prompt: a str (text), the path of a text, one prompt (modality -> raw value), a list of
            prompts, or None (unconditional, where no modality is given by name either).
        to: modality to generate; default the only one that the model has.
        trust_code: of `Generator.from_pretrained`.
        **settings: a condition by the name of its modality (``image``, ``audio``, ...): the path
            of a file, uint8 `(H, W, 3)` or a picture of Pillow, a Waveform or (samples `(N,)`
            float in [-1, 1], sample rate in Hz), see `by_reader`; and what `generate_tokens` takes.
    Returns:
        One raw value, or a list of them for a list of prompts: str, uint8 `(H, W, 3)`, Waveform; of
        a tokenizer of bytes the bytes of a file.
    Raises:
        UserError: no model, an unknown modality, a file that is missing or damaged, or what
            `generate_tokens` refuses.
    """
    conditions = {k: settings.pop(k) for k in list(settings) if k in table().raw}
    for name in settings.keys() - SETTINGS:
        raise UserError(
            f"no setting or modality '{name}'{did_you_mean(name, (*SETTINGS, *table().raw))}"
        )
    ready = isinstance(source, Generator)
    generator = source if ready else Generator.from_pretrained(source, trust_code=trust_code)
    to = generator.modality() if to is None else to
    many = not (prompt is None or isinstance(prompt, (str, Path, Mapping)))
    if many and conditions:
        raise UserError(
            f"'{next(iter(conditions))}' beside a list of prompts: put it into each prompt"
        )
    given: Any = prompt
    prompts: list[Any] = list(given) if many else [parse_prompt(given, conditions)]
    prompts = [by_reader(each, generator.vocabulary.ranges) for each in prompts]
    if note := generator.unseen(prompts):
        log.warning(note)
    values = generator.generate(prompts, to, **settings)
    return values if many else values[0]
