"""CSV, TSV and Parquet manifests."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, Literal

from mm.data.modalities.text import TextModality
from mm.data.sources.base import TableConfig, TableSource
from mm.errors import UserError
from mm.registry import SOURCES


@SOURCES.register("csv")
class CsvConfig(TableConfig):
    """Comma-separated with a header line; tabs when the name ends in .tsv."""

    kind: Literal["csv"] = "csv"

    def build(self) -> CsvSource:
        return CsvSource(self)


class CsvSource(TableSource):
    """See `CsvConfig`. Every value is a string: text or a relative path."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        csv.field_size_limit(max(csv.field_size_limit(), 2 * TextModality().max_text_bytes))
        # Undecodable bytes must not end the pack: they come through as surrogates, and reading that
        # value fails.
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(
                file, delimiter="\t" if self.path.suffix.lower() == ".tsv" else ","
            )
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield f"{self.path.name}:{reader.line_num}", f"csv: {error}"
                    continue
                extra = row.pop(None, None)  # type: ignore[call-overload]
                yield (
                    f"{self.path.name}:{reader.line_num}",
                    "csv: more fields than the header has" if extra else dict(row),
                )

    def names(self) -> list[str]:
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = csv.DictReader(
                file, delimiter="\t" if self.path.suffix.lower() == ".tsv" else ","
            ).fieldnames
        if not header:
            raise UserError(
                f"{self.path}: empty; the first line of a CSV manifest names the columns"
            )
        return list(header)


@SOURCES.register("parquet")
class ParquetConfig(TableConfig):
    """Parquet; image and audio columns may hold the file's bytes themselves."""

    kind: Literal["parquet"] = "parquet"

    def build(self) -> ParquetSource:
        return ParquetSource(self)


class ParquetSource(TableSource):
    """See `ParquetConfig`."""

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path}: not a readable Parquet file ({str(error)[:120]})"
            ) from error

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        import pyarrow

        number = 0
        with self._open() as file:
            batches = file.iter_batches(batch_size=256)
            while True:
                try:
                    batch = next(batches, None)
                    rows = batch.to_pylist() if batch is not None else []
                except (pyarrow.ArrowException, OSError, ValueError) as error:
                    raise UserError(
                        f"{self.path}: damaged from row {number} on ({str(error)[:120]}); copy it "
                        "again"
                    ) from error
                if batch is None:
                    return
                for row in rows:
                    yield f"{self.path.name}:{number}", row
                    number += 1

    def names(self) -> list[str]:
        with self._open() as file:
            return list(file.schema_arrow.names)

    def count(self) -> int:
        with self._open() as file:
            return file.metadata.num_rows
