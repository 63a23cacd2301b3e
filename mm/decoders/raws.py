"""What a caller gives and gets: modalities by the names of raw data, files, arrays, words."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.data.modalities.base import TEXT, BadSample, raw_modality, table
from mm.errors import UserError, did_you_mean
from mm.specs import ModalityTokenizer, TokenSpec, Waveform


def own_modality(name: str, known: Sequence[str]) -> str:
    """The model's modality that ``name`` means.

    Itself, or the one that is made of such raw values: `text` is `bytes` to a model of bytes.

    Raises:
        UserError: there is none, or more than one; names those that there are.
    """
    if name in known:
        return name
    made = [m for m in known if table().raw.get(m) == name]
    if len(made) == 1:
        return made[0]
    if made:
        raise UserError(f"'{name}' is {' or '.join(made)} to this model: say which of them")
    raise UserError(f"the model knows no modality '{name}'{did_you_mean(name, known)}")


def read_raw(modality: str, value: Any, tokenizer: ModalityTokenizer | None = None) -> Any:
    """Raw value that a tokenizer reads, of a file, an array, or what `Modality.accept` takes.

    Args:
        modality: of the tokens.
        value: a path is read; of a modality that is not text a str is a path, too.
        tokenizer: of ``modality``; one of bytes is given the file as it is.
    Raises:
        UserError: no such file, or it or the value is none of this modality.
    """
    if modality not in table().raw:  # of a tokenizer of someone else: it knows what it reads
        return value
    own = raw_modality(modality)
    is_file = isinstance(value, Path) or (isinstance(value, str) and not own.is_text)
    try:
        if is_file:
            return own.read(Path(value).read_bytes(), tokenizer)
        if isinstance(value, (bytes, bytearray, memoryview)) and not own.is_text:
            return own.read(bytes(value), tokenizer)
        return own.accept(value)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise UserError(f"{modality} {value}: {reason}") from error
    except BadSample as error:
        raise UserError(f"{modality} {value}: {error}" if is_file else str(error)) from error


def parse_prompt(
    prompt: str | Path | Mapping[str, Any] | None, conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """One prompt: modality -> what was given, text first, the rest in the order given.

    Raises UserError where a modality is given twice.
    """
    first = (
        dict(prompt) if isinstance(prompt, Mapping) else {} if prompt is None else {TEXT: prompt}
    )
    given = {modality: value for modality, value in conditions.items() if value is not None}
    if twice := first.keys() & given.keys():
        raise UserError(f"'{twice.pop()}' is given twice: in the prompt and by its own name")
    return {m: v for m, v in {**first, **given}.items() if not (isinstance(v, str) and v == "")}


def by_reader(prompt: Mapping[str, Any], specs: Sequence[TokenSpec]) -> dict[str, Any]:
    """A prompt by the modalities that read it: of a picture its values, where a model has both.

    Values are there to be read, and codes beside them to be written.

    Args:
        prompt: name of raw data, or of a modality of the model -> what was given.
        specs: of the model.
    """
    out = {}
    for name, value in prompt.items():
        of_it = [s.modality for s in specs if s.continuous and table().raw.get(s.modality) == name]
        out[of_it[0] if len(of_it) == 1 and of_it[0] not in prompt else name] = value
    return out


def writable_modalities(
    specs: Sequence[TokenSpec], tokenizers: Mapping[str, Any], heads: Container[str] = ()
) -> list[str]:
    """Modalities that a model can generate: values need a head, and all their tokenizer."""
    made = lambda s: not s.continuous or s.modality in heads
    return [s.modality for s in specs if s.modality in tokenizers and made(s)]


def unseen_words(
    prompts: Iterable[Mapping[str, Any]], tokenizers: Mapping[str, ModalityTokenizer]
) -> list[str]:
    """Words of the texts that no text had on which their tokenizer was fitted, once each."""
    found: dict[str, None] = {}
    for prompt in prompts:
        for modality, value in prompt.items():
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            if isinstance(text, str) and modality in tokenizers and raw_is_text(modality):
                words = getattr(tokenizers[modality], "words", None)
                found |= dict.fromkeys(words.unseen(text) if words is not None else ())
    return list(found)


def expected_tokens(spec: TokenSpec, value: Any) -> int:
    """Ids that a recording is encoded to, by its seconds; 0 of whatever has none."""
    if spec.tokens_per_second is None or not isinstance(value, Waveform):
        return 0
    return int(spec.tokens_per_second * len(value.samples) / value.sample_rate)


def raw_is_text(modality: str) -> bool:
    """True where the raw values of a token modality are text."""
    return modality not in table().raw or raw_modality(modality).is_text
