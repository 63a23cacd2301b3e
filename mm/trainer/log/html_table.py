"""A table of words, pictures and sounds as one HTML page that refers to nothing outside."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mm.data.modalities.base import show_file

MAX_BYTES = 2_000_000  # of a file; a larger one is named
MAX_LETTERS = 2000
STYLE = (
    "body{font:14px sans-serif}td,th{padding:6px 10px;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #ccc}img{min-width:64px;image-rendering:pixelated}"
    "td{white-space:pre-wrap;max-width:40ch;overflow-wrap:anywhere}"
)


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a page with a column for each key that one of ``rows`` has.

    A value is a number, a word, or the `Path` of a picture, a sound or a text.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{_cell(row.get(column))}</td>' for column in columns)}</tr>"
        for row in rows
    )
    return (
        f"<!doctype html><meta charset='utf-8'><style>{STYLE}</style><table><thead><tr>{head}</tr>"
        f"</thead><tbody>{body}</tbody></table>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, Path):
        return escape(str(value)[:MAX_LETTERS])
    shown = show_file(value)
    if shown.kind == "text":
        return escape(shown.content[:MAX_LETTERS])
    if len(shown.content) > MAX_BYTES:
        return escape(f"{value.name}: too long to show")
    kind = mimetypes.guess_type(f"x.{shown.ending}")[0] or f"{shown.kind}/{shown.ending}"
    uri = f"data:{kind};base64,{base64.b64encode(shown.content).decode()}"
    is_image = shown.kind == "image"
    return f'<img src="{uri}">' if is_image else f'<audio controls src="{uri}"></audio>'
