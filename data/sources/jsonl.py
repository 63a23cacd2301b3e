"""JSONL manifest: one object a line."""

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
