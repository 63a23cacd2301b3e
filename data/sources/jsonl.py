"""JSONL manifest, one object a line; or a JSON file, one list of objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from mm.data.sources.base import TableConfig, TableSource
from mm.errors import UserError
from mm.reading import parse_json
from mm.registry import SOURCES

HEAD = 1000  # rows that tell which columns there are


@SOURCES.register("jsonl")
class JsonlConfig(TableConfig):
    """One sample a line; columns that are no modality become metadata.

    `{"key": "a", "image": "a.png", "text": "a cat", "split": "train"}`
    """

    kind: Literal["jsonl"] = "jsonl"

    def build(self) -> JsonlSource:
        return JsonlSource(self)


class JsonlSource(TableSource):
    """See `JsonlConfig`."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{self.path.name}:{number}"
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except ValueError as error:
                    yield where, f"json: {str(error)[:160]}"
                    continue
                yield where, row if isinstance(row, dict) else "json: the line is no object"

    def names(self) -> list[str]:
        found: dict[str, None] = {}
        for number, (_, row) in enumerate(self.rows()):
            if isinstance(row, dict):
                found |= dict.fromkeys(row)
            if number >= HEAD:
                break
        if not found:
            raise UserError(
                f"{self.path}: no readable line; a JSONL manifest has one JSON object a line"
            )
        return list(found)

    def count(self) -> int:
        with open(self.path, "rb") as file:
            return sum(1 for line in file if line.strip())


@SOURCES.register("json")
class JsonConfig(TableConfig):
    """One list of objects, one sample each."""

    kind: Literal["json"] = "json"

    def build(self) -> JsonSource:
        return JsonSource(self)


class JsonSource(TableSource):
    """See `JsonConfig`. The file is read whole."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        try:
            values = parse_json(self.path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{self.path}: no JSON ({str(error)[:160]}); mend that place"
            ) from error
        if not isinstance(values, list):
            raise UserError(f"{self.path}: no list of objects; write one object a line as .jsonl")
        for number, row in enumerate(values):
            where = f"{self.path.name}[{number}]"
            yield where, row if isinstance(row, dict) else "json: the item is no object"

    def names(self) -> list[str]:
        found: dict[str, None] = {}
        for _, row in self.rows():
            if isinstance(row, dict):
                found |= dict.fromkeys(row)
        if not found:
            raise UserError(f"{self.path}: no object in its list")
        return list(found)
