"""Hugging Face datasets on disk (`Dataset.save_to_disk`), read with pyarrow alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mm.data.sources.base import SPLITS, Record, Source, TableConfig, TableSource
from mm.errors import UserError
from mm.reading import parse_json
from mm.registry import SOURCES

STATE, DICT, INFO = "state.json", "dataset_dict.json", "dataset_info.json"
ROWS = 64  # decoded to Python at a time: a row may hold an image


def is_saved_dataset(folder: Path) -> bool:
    """True for what `save_to_disk` of a Dataset or a DatasetDict wrote."""
    return (folder / DICT).is_file() or ((folder / STATE).is_file() and (folder / INFO).is_file())


@SOURCES.register("hf")
class HfConfig(TableConfig):
    """A folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Class labels become their names, so that a label column can be the text.
    """

    kind: Literal["hf"] = "hf"

    def build(self) -> Source:
        return HfSource(self)


class HfSource(Source):
    """Every split of the folder, in its own order."""

    def __init__(self, config: HfConfig):
        self.path = config.path
        if (self.path / DICT).is_file():
            names = _read(self.path / DICT).get("splits", [])
            self.parts = [_Split(config, self.path / name, name) for name in names]
        else:
            name = str(_read(self.path / STATE).get("_split") or "train")
            self.parts = [_Split(config, self.path, SPLITS.get(name, "train"))]
        if not self.parts:
            raise UserError(f"{self.path}: no split in {DICT}")

    def __iter__(self) -> Iterator[Record]:
        for part in self.parts:
            for record in part:
                # One key a row over all splits; a row's own "key" and "split" win.
                own = record.key.startswith(f"{part.path.stem}-")
                yield record._replace(
                    key=f"{part.split}/{record.key}" if own else record.key,
                    split=record.split or part.split,
                )

    def count(self) -> int:
        return sum(part.count() for part in self.parts)

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(p.fingerprint() for p in self.parts).encode()).hexdigest()


class _Split(TableSource):
    """One dataset folder: Arrow streams that state.json lists."""

    def __init__(self, config: HfConfig, folder: Path, split: str):
        super().__init__(config.model_copy(update={"root": config.root or folder}))
        self.path, self.split = folder, split
        state = _read(folder / STATE)
        if state.get("_indices_data_files"):
            raise UserError(
                f"{folder}: has an indices mapping; save it again after dataset.flatten_indices()"
            )
        self.files = [folder / Path(f["filename"]).name for f in state.get("_data_files", [])]
        missing = [f.name for f in self.files if not f.is_file()]
        if missing or not self.files:
            raise UserError(f"{folder}: {missing[0] if missing else 'no Arrow file'} is missing")
        info = folder / INFO
        features = (_read(info).get("features") or {}) if info.is_file() else {}
        self.labels = {
            name: list(f["names"])
            for name, f in features.items()
            if isinstance(f, dict) and f.get("_type") == "ClassLabel" and f.get("names")
        }

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        number = 0
        for file in self.files:
            for batch in _batches(file):
                for start in range(0, batch.num_rows, ROWS):
                    for row in batch.slice(start, ROWS).to_pylist():
                        for name, names in self.labels.items():
                            value = row.get(name)
                            if isinstance(value, int):
                                row[name] = names[value] if 0 <= value < len(names) else None
                        yield f"{file.name}:{number}", row
                        number += 1

    def names(self) -> list[str]:
        import pyarrow

        with _reader(self.files[0]) as reader:
            assert isinstance(reader.schema, pyarrow.Schema)
            return list(reader.schema.names)

    def count(self) -> int:
        return sum(batch.num_rows for file in self.files for batch in _batches(file))

    def fingerprint(self) -> str:
        """Of the Arrow files' sizes and the state, which changes with every transform."""
        sizes = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        text = (self.path / STATE).read_text() + repr(sizes)
        return hashlib.sha256(text.encode()).hexdigest()


def _reader(file: Path) -> Any:
    """Open the streaming format that `datasets` writes, or the random-access one."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source)
    except (pyarrow.ArrowException, OSError):
        try:
            return pyarrow.ipc.open_file(source)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable Arrow file ({str(error)[:120]})") from error


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow

    with _reader(file) as reader:
        try:
            if hasattr(reader, "num_record_batches"):
                for i in range(reader.num_record_batches):
                    yield reader.get_batch(i)
            else:
                yield from reader
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: cut short or damaged ({str(error)[:120]})") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({str(error)[:120]})") from error
