"""Modality: one kind of raw data, and all that the other parts must know of it.

A modality is one file and one line of `mm.registry.MODALITIES`. What is said of all of them is
derived: the files that a source takes, the columns of a table, what a shard may hold, the order of
a sample, units, colours, options, how a sample is shown and written.
"""

from __future__ import annotations

import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from mm.config import Config
from mm.errors import UserError, did_you_mean
from mm.plug_point import load_plugins
from mm.registry import MODALITIES

Look = Literal["text", "image", "audio"]
TEXT = "text"  # what a prompt, a caption and a text file are


class BadSample(ValueError):
    """This sample cannot be used; the message is the reason."""


class Shown(NamedTuple):
    """A file as pages and trackers show it: words, or the bytes of a picture or a sound."""

    kind: Look
    content: Any  # str, or bytes
    ending: str = ""  # of the bytes


class Features(ABC):
    """What a judge sees of raw values: rows of numbers for a classifier."""

    standardise: ClassVar[bool] = True  # bring every feature to one scale first

    def fit(self, raws: Sequence[Any]) -> Features:
        """Look at the values that the judge will be trained on."""
        return self

    @abstractmethod
    def __call__(self, raws: Sequence[Any]) -> np.ndarray:
        """(N, F) float32."""


class Modality(Config):
    """Base of modalities. Fields of a subclass are its settings, such as what an item may cost.

    Every fault of the input is a `BadSample`, which packing writes to the quarantine; nothing else
    may come out of `decode`, `check`, `check_whole` and `length`.
    """

    kind: str

    order: ClassVar[int] = 100  # in samples, tables and pages; equals stand by name
    extensions: ClassVar[tuple[str, ...]]  # of its files; the first is what `save` writes
    value_name: ClassVar[str]  # of a raw value, for messages
    unit: ClassVar[str] = "bytes"  # of `length`
    # Token modalities made from its values (its own first) -> colour 0..7 in every chart:
    tokens: ClassVar[Mapping[str, int]] = {}
    shown_as: ClassVar[Look] = "text"  # by trackers and reports
    any_ending: ClassVar[bool] = False  # its files may end as they like, but as no other's
    is_text: ClassVar[bool] = False  # values stand in tables and prompts themselves
    has_items: ClassVar[bool] = False  # data kind `items` can batch it: `item` and `stack`
    reconstruction: ClassVar[str] = ""  # what a tokenizer network calls its output: `from_network`

    def build(self) -> Modality:
        return self

    @abstractmethod
    def decode(self, data: bytes) -> Any:
        """Raw value of a file's bytes, of which the header is checked first. Raises BadSample."""

    def length(self, data: bytes) -> int:
        """Length of a file in `unit`, from its header alone if it has one. Raises BadSample."""
        return len(data)

    def check(self, data: bytes) -> tuple[str, int]:
        """Decode once to prove that it can be; returns (true extension, length in `unit`).

        Raises BadSample.
        """
        self.decode(data)
        return self.extensions[0], self.length(data)

    def check_whole(self, data: bytes) -> None:
        """Refuse a file that decodes, but holds less than it says or too little to be of use.

        Asked by packing alone. Raises BadSample.
        """

    @abstractmethod
    def owns(self, value: Any) -> bool:
        """True for a raw value of this modality."""

    @abstractmethod
    def describe(self, value: Any) -> str:
        """One line about a raw value."""

    @abstractmethod
    def save(self, value: Any, path: Path) -> None:
        """Write a raw value as a file of ``extensions[0]``, or of the one that ``path`` has."""

    def read(self, data: bytes, tokenizer: Any = None) -> Any:
        """What a tokenizer takes of a file: its raw value, or the sound file as it is.

        Raises BadSample.
        """
        if self.is_text or not getattr(tokenizer, "reads_files", False):
            return self.decode(data)
        self.check(data)
        return data

    def accept(self, value: Any) -> Any:
        """Raw value of what a caller of Python has. Raises BadSample."""
        if self.owns(value):
            return value
        raise BadSample(f"{self.kind}: a {type(value).__name__} is not {self.value_name}")

    def file_of(self, value: Any) -> bytes:
        """A raw value as the bytes of a file of ``extensions[0]``."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"value.{self.extensions[0]}"
            self.save(value, path)
            return path.read_bytes()

    def write(self, value: Any, path: Path) -> Path:
        """Write a raw value, or a file's bytes as they are; without a suffix it gets one.

        Raises UserError on a suffix that is of no file of this modality.
        """
        as_it_is = isinstance(value, bytes) and not self.is_text
        if not path.suffix:
            path = path.with_suffix(
                f".{self._extension(value) if as_it_is else self.extensions[0]}"
            )
        elif not as_it_is or path.suffix != ".bin":
            self.check_ending(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if as_it_is:
            path.write_bytes(value)
        else:
            self.save(value, path)
        return path

    def _extension(self, data: bytes) -> str:
        try:
            return self.check(data)[0]
        except BadSample:
            return "bin"

    def check_ending(self, path: Path) -> None:
        """Raises UserError unless the suffix, if there is one, is of a file of this modality."""
        ending = path.suffix.removeprefix(".").lower()
        other = table().extensions.get(ending)
        if not ending or other == self.kind or (self.any_ending and other is None):
            return
        is_of = f"is of {other}" if other else "is unknown"
        raise UserError(
            f"{path}: .{ending} {is_of}; {self.kind} is written as "
            f".{', .'.join(self.extensions)}: write -o {path.with_suffix('.' + self.extensions[0])}"
        )

    def view(self, value: Any) -> Any:
        """A raw value to look at: of a file's bytes what they hold, or why they cannot be read."""
        if self.is_text or not isinstance(value, bytes):
            return value
        try:
            return self.decode(value)
        except BadSample as error:
            return f"{len(value)} bytes that cannot be read: {error}"

    def show(self, data: bytes) -> Shown:
        """A file as `shown_as` says. Raises BadSample."""
        text = self.shown_as == "text"
        return Shown(self.shown_as, data.decode("utf-8", "replace") if text else data)

    def line(self, value: Any) -> str:
        """`describe` of a raw value or of a file's bytes."""
        shown = self.view(value)
        if isinstance(shown, str) and not self.is_text:
            return shown
        return modality_of_value(shown).describe(shown)

    def vary(self, data: bytes, key: int) -> bytes:
        """Bytes of a file that shows the same otherwise, by ``key``; here the file itself.

        Raises BadSample.
        """
        return data

    def n_bytes(self, value: Any, tokenizer: Any = None) -> int:
        """Bytes of a raw value; with a tokenizer, of what it reads of the value."""
        return int(np.asarray(value).nbytes)

    def item(self, value: Any, config: Any) -> np.ndarray:
        """All of an item's preparation that is the same in every epoch. Of `has_items`.

        Args:
            value: raw value.
            config: `mm.data.streams.raw_items.ItemsConfig`.
        """
        raise NotImplementedError

    def stack(self, items: Sequence[np.ndarray], counts: np.ndarray, key: int, config: Any) -> Any:
        """`mm.batch.Values` of G prepared items. Of `has_items`.

        Args:
            items: of `item`.
            counts: (G,) int64 global numbers of the items: with ``key`` all that is random.
            key: of the random numbers, see `mm.data.streams.shuffle.uniform`.
            config: as of `item`.
        """
        raise NotImplementedError

    def from_network(self, x: Any, length: int, sample_rate: int) -> Any:
        """Raw value of one item of a `stack`, or of a network's reconstruction of it."""
        raise NotImplementedError

    def features(self) -> Features:
        """What a judge sees of raw values. Raises UserError where there is no judge."""
        judged = [m.kind for m in modalities() if type(m).features is not Modality.features]
        raise UserError(f"no judge for '{self.kind}'; there are: {', '.join(sorted(judged))}")


class Table(NamedTuple):
    """All modalities in their order, and what is looked up in them."""

    modalities: Mapping[str, Modality]  # with their default settings
    extensions: Mapping[str, str]  # of a file -> modality
    raw: Mapping[str, str]  # token modality -> modality of the values that it is made from
    colours: Mapping[str, int]  # token modality -> colour


def table() -> Table:
    """What is registered now, plug-ins included."""
    load_plugins()
    return _table(tuple(MODALITIES))


@lru_cache(maxsize=8)
def _table(kinds: tuple[str, ...]) -> Table:
    made: list[Any] = [MODALITIES.get(kind)() for kind in kinds]
    made.sort(key=lambda m: (m.order, m.kind))
    extensions: dict[str, str] = {}
    for m in made:
        for extension in m.extensions:
            other = extensions.setdefault(extension, m.kind)
            if other != m.kind:
                raise ValueError(f"modalities '{other}' and '{m.kind}' both claim .{extension}")
    raw = {name: m.kind for m in made for name in m.tokens or (m.kind,)}
    colours = {name: colour for m in made for name, colour in m.tokens.items()}
    return Table({m.kind: m for m in made}, extensions, raw, colours)


def modalities() -> tuple[Modality, ...]:
    """Every modality with its default settings, in order."""
    return tuple(table().modalities.values())


def get_modality(kind: str, settings: Mapping[str, Any] | None = None) -> Modality:
    """One modality. Raises UserError with a suggestion on an unknown one."""
    found = table().modalities.get(kind)
    if found is None:
        known = table().modalities
        raise UserError(f"unknown modality '{kind}'{did_you_mean(kind, known)}")
    return type(found).model_validate({"kind": kind, **settings}) if settings else found


def raw_modality(token_modality: str) -> Modality:
    """The modality whose raw values a token modality is made from: of ``bytes``, text."""
    return get_modality(table().raw.get(token_modality, token_modality))


def modality_of_value(value: Any) -> Modality:
    """The modality of a raw value. Raises UserError on anything else."""
    for m in modalities():
        if m.owns(value):
            return m
    *names, last = (m.value_name for m in modalities())
    raise UserError(f"a {type(value).__name__} is neither {', '.join(names)} nor {last}")


def show_file(path: Path) -> Shown:
    """`Modality.show` by the ending of a file; one that is damaged, or of no modality, as words."""
    data, ending = path.read_bytes(), path.suffix[1:].lower()
    kind = table().extensions.get(ending, TEXT)
    try:
        shown = get_modality(kind).show(data)
    except BadSample as error:
        return Shown("text", f"{path.name}: {error}")
    return shown if shown.ending else shown._replace(ending=ending)


def sort_key(token_modality: str) -> tuple[int, str]:
    """Sorts raw and token modalities: text, bytes, image, audio, then what is unknown by name."""
    known = list(table().raw)
    known_at = known.index(token_modality) if token_modality in known else len(known)
    return known_at, token_modality


def either() -> str:
    """The modalities for a sentence: "text, image or audio"."""
    *names, last = (m.kind for m in modalities())
    return f"{', '.join(names)} or {last}" if names else last


def one_line(error: Exception) -> str:
    """What a decoder said, for a `BadSample`."""
    text = re.sub(r"<_io\.BytesIO[^>]*>", "this file", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:160]}"
