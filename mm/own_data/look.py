"""Look at raw files as `mm data pack` would read them: what there is, how large, which classes.

Nothing is written and nothing is chosen here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from mm.data.modalities.base import BadSample, get_modality, table
from mm.data.shards.members import split_ordinal
from mm.data.sources.base import SPLITS, Record, read_inside
from mm.data.sources.detect import TEXTS, open_source
from mm.data.sources.folder import FolderSource
from mm.data.sources.text import TextSource
from mm.data.streams.shuffle import key_of
from mm.errors import UserError

RECORDS = 200_000  # samples that are listed; a larger source is judged by its first ones
VALUES = {"text": 5000, "image": 200, "audio": 500}  # values that are read, evenly spread
CLASSES = 1000  # distinct words over this are no classes
A_CLASS = 5  # samples that a class has on average, at least
CAPTION = 60  # bytes: a longer text is no class word
COLOURED = 8  # of 255: channels this far apart are colour, as the judges take it
FILE_NAMES = (r"^(?P<text>[A-Za-z]+)[_-]?\d", r"^(?P<text>\d+)_[A-Za-z]")


class TextStatistics(NamedTuple):
    """Of the UTF-8 of all texts; ``total`` is the estimate from those that were read."""

    n: int
    total: int  # bytes
    mean: float
    longest: int


class ImageStatistics(NamedTuple):
    """Pixels of the shorter side (median), and the share of pictures that have colour."""

    n: int
    side: int
    coloured: float


class AudioStatistics(NamedTuple):
    """Sample rate in Hz (median) and lengths in seconds."""

    n: int
    rate: int
    seconds: float
    longest: float


class Classes(NamedTuple):
    """``where``: caption, label, parent, or a regex of file names: what says the class."""

    words: tuple[str, ...]
    where: str


class SampleFile(NamedTuple):
    """A value that is a file of its own."""

    key: str
    split: str | None
    path: Path


class Found(NamedTuple):
    """What `look` saw. ``pairs``: modalities of a sample -> number of samples."""

    src: Path
    kind: str  # of the source: folder, text, jsonl, ...
    samples: int
    pairs: Mapping[tuple[str, ...], int]
    splits: Mapping[str, int]
    keys: tuple[str, ...]  # of the samples that no split is named for, or that are train
    text: TextStatistics | None = None
    image: ImageStatistics | None = None
    audio: AudioStatistics | None = None
    classes: Classes | None = None
    starts: tuple[str, ...] = ()  # first words of some texts
    files: Mapping[str, Sequence[SampleFile]] = {}  # modality -> files of some samples
    bad: tuple[str, ...] = ()  # why a value could not be read, of those that were tried

    @property
    def modalities(self) -> tuple[str, ...]:
        order = table().modalities
        have = {m for pair in self.pairs for m in pair}
        return tuple(sorted(have, key=lambda m: (order[m].order, m)))

    def held_out_files(self, modality: str, split: str, share: float) -> list[Path]:
        """Files of a split; where no sample is named for val, those that --val-share takes."""
        taken = lambda f: key_of("val", f.key) < share * 2**64 and f.split in (None, "train")
        if split == "val" and not self.splits.get("val"):
            return [f.path for f in self.files.get(modality, ()) if taken(f)]
        return [f.path for f in self.files.get(modality, ()) if f.split == split]

    def held_out(self, share: float) -> int:
        """Samples that `mm data pack --val-share` would take out of train."""
        if self.kind == "text":  # its end
            return round(share * len(self.keys))
        return sum(key_of("val", key) < share * 2**64 for key in self.keys)


def look(src: Path) -> Found:
    """Statistics of a source. Raises UserError when there is nothing to pack in ``src``."""
    src = one_text(src)
    source = open_source(src, None, {})
    if isinstance(source, FolderSource):  # what is incomplete counts here
        source = open_source(src, None, {"incomplete": "keep"})
    records, bad = [], []
    for record in source:
        if record.bad:
            bad.append(record.bad)
        elif record.values:
            records.append(record)
        if len(records) >= RECORDS:
            break
    if not records:
        raise UserError(f"{src}: no readable sample; the first of {len(bad)}: {bad[:1]}")
    pairs = Counter(tuple(sorted({split_ordinal(m)[1] for m in r.values})) for r in records)
    splits = Counter(SPLITS.get(r.split or "", r.split or "") for r in records)
    reader = Reader(records, bad)
    text, texts = reader.text()
    found = Found(
        src,
        "text" if isinstance(source, TextSource) else type(source).__name__.lower()[:-6],
        len(records),
        dict(pairs),
        {name: n for name, n in splits.items() if name},
        tuple(r.key for r in records if SPLITS.get(r.split or "train", r.split) == "train"),
        text=text,
        image=reader.image(),
        audio=reader.audio(),
        classes=None if isinstance(source, TextSource) else find_classes(records, texts),
        starts=tuple(dict.fromkeys(filter(None, map(first_words, texts[:: len(texts) // 8 or 1])))),
        files={m: reader.files(m) for m in ("image", "audio")},
        bad=tuple(bad),
    )
    return found


def one_text(src: Path) -> Path:
    """The file of a folder that holds one text alone: it has many documents, the folder one."""
    if not src.is_dir():
        return src
    files = [path for path in src.iterdir() if not path.name.startswith(".")]
    alone = len(files) == 1 and files[0].is_file() and files[0].suffix.lower() in TEXTS
    return files[0] if alone else src


class Reader:
    """Reads evenly spread values of a modality; what cannot be read goes to ``bad``."""

    def __init__(self, records: Sequence[Record], bad: list[str]):
        self.records, self.bad = records, bad

    def readers(self, modality: str) -> list[Callable[[], bytes]]:
        return [
            read
            for r in self.records
            for member, read in r.values.items()
            if split_ordinal(member)[1] == modality
        ]

    def each(self, modality: str, use: Callable[[bytes], Any]) -> tuple[int, list[Any]]:
        """Number of values, and what ``use`` makes of some of them."""
        readers = self.readers(modality)
        out = []
        for i in np.unique(np.linspace(0, len(readers) - 1, VALUES[modality]).round().astype(int)):
            try:
                out += [use(readers[i]())] if readers else []
            except BadSample as error:
                self.bad.append(str(error))
        return len(readers), out

    def text(self) -> tuple[TextStatistics | None, list[str]]:
        n, texts = self.each("text", get_modality("text").decode)
        if not texts:
            return None, []
        sizes = [len(text.encode()) for text in texts]
        mean = float(np.mean(sizes))
        return TextStatistics(n, round(n * mean), mean, max(sizes)), texts

    def image(self) -> ImageStatistics | None:
        n, seen = self.each("image", lambda data: pixels_of(get_modality("image").decode(data)))
        if not seen:
            return None
        sides, coloured = zip(*seen, strict=True)
        return ImageStatistics(n, int(np.median(sides)), float(np.mean(coloured)))

    def audio(self) -> AudioStatistics | None:
        header: Any = get_modality("audio")
        n, seen = self.each("audio", lambda data: header.header(data)[1:])
        if not seen:
            return None
        seconds = [frames / rate for frames, rate in seen]
        rate = int(np.median([rate for _, rate in seen]))
        return AudioStatistics(n, rate, float(np.mean(seconds)), max(seconds))

    def files(self, modality: str) -> tuple[SampleFile, ...]:
        """Evenly spread samples whose value is a file of its own."""
        out = []
        for r in self.records[:: max(1, len(self.records) // 500)]:
            read = r.values.get(modality)
            if isinstance(read, partial) and read.func is read_inside:
                path = Path(read.args[0], read.args[1])
                out.append(SampleFile(r.key, SPLITS.get(r.split or "", r.split), path))
        return tuple(out)


def pixels_of(raw: np.ndarray) -> tuple[int, bool]:
    """(shorter side, has colour) of uint8 (H, W, 3)."""
    return min(raw.shape[:2]), bool(np.ptp(raw, axis=2).max() > COLOURED)


def first_words(text: str) -> str:
    """The beginning of a text, for a prompt: one line, some words, no more than 24 characters."""
    line = text.strip().split("\n")[0].strip()
    return line if len(line) <= 24 else line[:24].rsplit(" ", 1)[0]


def find_classes(records: Sequence[Record], texts: Sequence[str]) -> Classes | None:
    """What says the class of a sample: its label, its caption, its folder, or its file's name."""
    labels = [r.meta.get("label") for r in records]
    if words := few([label for label in labels if isinstance(label, str)], len(records)):
        return Classes(words, "label")
    captioned = any("text" in r.values for r in records)
    if captioned:
        captions = [text.strip() for text in texts]
        if len(set().union(*({*r.values} for r in records))) > 1:
            if max(map(len, captions)) <= CAPTION and (words := few(captions, len(captions))):
                return Classes(one_word(captions) or words, "caption")
            if words := one_word(captions):
                return Classes(words, "caption")
        return None
    paths = [PurePosixPath(r.key) for r in records]
    parents = [path.parent.name for path in paths]
    if all(parent and parent.lower() not in SPLITS for parent in parents) and few(
        parents, len(parents)
    ):
        return Classes(tuple(sorted({p.replace("_", " ") for p in parents})), "parent")
    for regex in FILE_NAMES:
        matches = [re.search(regex, path.name) for path in paths]
        if all(matches) and (words := few([m["text"] for m in matches if m], len(paths))):
            return Classes(words, regex)
    return None


def few(words: Iterable[str], n: int) -> tuple[str, ...]:
    """The distinct ones where they are classes of all ``n`` samples; nothing otherwise."""
    counts = Counter(words)
    fits = 2 <= len(counts) <= CLASSES and counts.total() == n and n >= A_CLASS * len(counts)
    return tuple(sorted(counts)) if fits and "" not in counts else ()


def one_word(captions: Sequence[str]) -> tuple[str, ...]:
    """The last, or the first, words of captions such as "a photo of a cat", where they are classes.

    Nothing where a caption holds two of them, or where the caption itself is the word.
    """
    for place in (-1, 0):
        split = [re.findall(r"\w+", caption.lower()) for caption in captions]
        if not all(split) or all(len(words) == 1 for words in split):
            return ()
        found = few([words[place] for words in split], len(split))
        if found and all(len({*words} & {*found}) == 1 for words in split):
            return found
    return ()
