"""Conversations as people store them: OpenAI messages, ShareGPT, Alpaca, pairs of columns."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from mm.data.modalities.base import BadSample, table
from mm.errors import UserError, did_you_mean
from mm.reading import parse_json

SYSTEM, USER, ASSISTANT, TOOL = ROLES = ("system", "user", "assistant", "tool")
# What other shapes call them
ALIASES = {
    "developer": SYSTEM, "human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT,
    "bot": ASSISTANT, "function": TOOL, "observation": TOOL, "function_call": ASSISTANT,
}  # fmt: skip
# What a map names -> columns that are taken for it when none is given, likeliest first
COLUMNS = {
    "messages": ("messages", "conversations", "conversation", "dialog", "chat"),
    "system": ("system", "system_prompt"),
    "user": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),
    "assistant": ("output", "response", "completion", "answer"),
}
PASSED = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # keys that templates read
MAX_MESSAGES = 2000
EMPTY = "empty: "  # a sample that has nothing to learn begins its reason so
LOOKED_AT = 20  # rows that tell the shape


class Media(NamedTuple):
    """A part of a message that is no text. ``value``: a path, {"path": ..} or {"bytes": ..}."""

    modality: str
    value: Any


class Message(NamedTuple):
    """One turn. ``more``: what else its template may read, such as tool calls."""

    role: str
    parts: tuple[str | Media, ...]
    more: Mapping[str, Any] = {}

    @property
    def empty(self) -> bool:
        """True of a turn that says nothing."""
        written = any(not isinstance(p, str) or p.strip() for p in self.parts)
        return not written and not self.more.get("tool_calls")


class Conversation(NamedTuple):
    """Turns in their order, and the tools that the template may describe."""

    messages: tuple[Message, ...]
    tools: Any = None


def guess_map(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """What each column of a table is to a conversation; None where it holds none.

    Args:
        names: columns.
        rows: the first ones.
    """
    media = _media_columns(names)
    for column in COLUMNS["messages"]:
        if any(_is_turns(row.get(column)) for row in rows):
            return {"messages": column} | media
    found = {
        kind: next(c for c in usual if c in names)
        for kind, usual in COLUMNS.items()
        if kind != "messages" and any(c in names for c in usual)
    }
    return found | media if {"user", "assistant"} <= found.keys() else None


def check_map(given: Mapping[str, str], names: Sequence[str], origin: str) -> dict[str, str]:
    """A map that somebody wrote. Raises UserError naming what is unknown or missing."""
    known = (*COLUMNS, *_kinds())
    for kind, column in given.items():
        if kind not in known:
            raise UserError(f"--map {kind}={column}: unknown{did_you_mean(kind, known)}")
        if column not in names:
            raise UserError(
                f"{origin}: --map {kind}={column}: no column '{column}'; columns: "
                f"{', '.join(names)}"
            )
    if "messages" in given and given.keys() & {"user", "assistant", "input", "system"}:
        raise UserError(
            f"--map messages={given['messages']} holds whole conversations: map media beside it, "
            "and nothing else"
        )
    if "messages" not in given and not {"user", "assistant"} <= given.keys():
        raise UserError(
            f"{origin}: --map names no conversation: give messages=COLUMN, or user=COLUMN and "
            f"assistant=COLUMN; columns: {', '.join(names)}"
        )
    return dict(given)


def read_row(row: Mapping[str, Any], mapping: Mapping[str, str]) -> Conversation:
    """The conversation of a row. Raises BadSample; its reason begins with `EMPTY` of an empty one.

    A word such as ``<image>`` in a text stands for the next one of the row's own media columns;
    without any, they come first in the first turn of the user.
    """
    if "messages" in mapping:
        messages = list(read_messages(row.get(mapping["messages"])))
    else:
        messages = list(_pair(row, mapping))
    columns = {k: _items(k, row.get(c)) for k, c in mapping.items() if k in _kinds()}
    messages = _place_media(messages, {k: v for k, v in columns.items() if v})
    if not messages:
        raise BadSample(f"{EMPTY}no message")
    if not any(m.role == ASSISTANT for m in messages):
        raise BadSample(f"{EMPTY}no turn of the assistant")
    for number, message in enumerate(messages):
        if message.role == ASSISTANT and message.empty:
            raise BadSample(f"{EMPTY}message {number} of the assistant says nothing")
    if all(m.empty for m in messages if m.role != ASSISTANT):
        raise BadSample(f"{EMPTY}only the assistant says something")
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    return Conversation(tuple(messages), tools or None)


def read_messages(value: Any) -> tuple[Message, ...]:
    """Turns of OpenAI's or ShareGPT's shape, or JSON of them. Raises BadSample."""
    return tuple(_turns(value))


def _is_turns(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return False
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, dict) and ("role" in v or "from" in v) for v in value)
    )


def _json(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise BadSample(f"{what}: no JSON ({str(error)[:120]})") from error


def _turns(value: Any) -> Iterator[Message]:
    if isinstance(value, str):
        value = _json(value, "messages")
    if value is None or value == []:
        raise BadSample(f"{EMPTY}no message")
    if not isinstance(value, (list, tuple)):
        raise BadSample(f"messages: expected a list, found {value!r:.60}")
    if len(value) > MAX_MESSAGES:
        raise BadSample(f"messages: {len(value)} of them, the cap is {MAX_MESSAGES}")
    for number, turn in enumerate(value):
        where = f"message {number}"
        if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
            raise BadSample(f"{where}: expected a role and a content, found {turn!r:.60}")
        named = turn.get("role", turn.get("from"))
        role = ALIASES.get(str(named).lower(), str(named).lower())
        if role not in ROLES:
            raise BadSample(
                f"{where}: unknown role '{str(named)[:40]}'"
                f"{did_you_mean(str(named), (*ROLES, *ALIASES))}"
            )
        more = {k: turn[k] for k in PASSED if turn.get(k)}
        content = turn.get("content", turn.get("value"))
        yield Message(role, tuple(_parts(content, where)), more)


def _parts(content: Any, where: str) -> Iterator[str | Media]:
    if content is None:
        return
    if isinstance(content, str):
        yield _text(content, where)
        return
    if not isinstance(content, (list, tuple)):
        raise BadSample(f"{where}: content is neither text nor a list, but {content!r:.60}")
    for number, part in enumerate(content):
        here = f"{where}, part {number}"
        if isinstance(part, str):
            yield _text(part, here)
            continue
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise BadSample(f"{here}: expected a type, found {part!r:.60}")
        kind = part["type"]
        if kind == "text":
            yield _text(part.get("text"), here)
            continue
        modality = kind.removeprefix("input_").removesuffix("_url").removesuffix("_file")
        if modality not in _kinds():
            raise BadSample(
                f"{here}: unknown type '{kind[:40]}'{did_you_mean(kind, ('text', *_kinds()))}"
            )
        given = (part.get(k) for k in (kind, modality, f"{modality}_url", "url", "path", "data"))
        value = next((v for v in given if v is not None), part)
        yield Media(modality, _value(value, here))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadSample(f"{where}: expected text, found {value!r:.60}")
    return value


def _value(value: Any, where: str) -> Any:
    """What a table source reads: a path, or {"bytes": ..} of a data URI. No URL is fetched."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return {"bytes": value["bytes"]}
        if isinstance(value.get("data"), str):  # OpenAI's input_audio
            return {"bytes": _decoded(value["data"], where)}
        value = value.get("url", value.get("path"))
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value)}
    if not isinstance(value, str) or not value:
        raise BadSample(f"{where}: neither a path, a data URI nor bytes: {value!r:.60}")
    if value.startswith("data:"):
        head, comma, body = value.partition(",")
        if not comma:
            raise BadSample(f"{where}: a data URI without data")
        encoded = head.endswith(";base64")
        return {"bytes": _decoded(body, where) if encoded else unquote_to_bytes(body)}
    if re.match(r"https?://", value):
        raise BadSample(f"{where}: '{value[:80]}' is not fetched: give a file beside the table")
    return value.removeprefix("file://")


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(f"{where}: no base64 ({error})") from error


def _pair(row: Mapping[str, Any], mapping: Mapping[str, str]) -> Iterator[Message]:
    def cell(kind: str) -> str:
        value = row.get(mapping[kind]) if kind in mapping else None
        if value is not None and not isinstance(value, str):
            raise BadSample(f"{mapping[kind]}: expected text, found {value!r:.60}")
        return value or ""

    if cell("system"):
        yield Message(SYSTEM, (cell("system"),))
    asked = "\n\n".join(text for text in (cell("user"), cell("input")) if text.strip())
    yield Message(USER, (asked,))
    yield Message(ASSISTANT, (cell("assistant"),))


def _kinds() -> list[str]:
    return [m for m in table().modalities if m != "text"]


def _media_columns(names: Sequence[str]) -> dict[str, str]:
    both = {kind: next((c for c in (kind, f"{kind}s") if c in names), None) for kind in _kinds()}
    return {kind: column for kind, column in both.items() if column}


def _items(kind: str, value: Any) -> list[Any]:
    given = value if isinstance(value, (list, tuple)) else [value]
    return [_value(v, kind) for v in given if v is not None and v != ""]


def _place_media(messages: list[Message], columns: Mapping[str, list[Any]]) -> list[Message]:
    """Media of columns, at the words that stand for them."""
    for kind, values in columns.items():
        mark, left, n = f"<{kind}>", list(values), 0
        placed = []
        for message in messages:
            parts: list[str | Media] = []
            for part in message.parts:
                if not isinstance(part, str):
                    parts.append(part)
                    continue
                first, *rest = part.split(mark)
                parts.append(first)
                for text in rest:
                    n += 1
                    parts += [Media(kind, left.pop(0))] if left else []
                    parts.append(text)
            placed.append(message._replace(parts=tuple(p for p in parts if p != "")))
        if n == 0:
            at = next((i for i, m in enumerate(messages) if m.role == USER), None)
            if at is None:
                raise BadSample(f"{kind}: no turn of the user to put it into")
            first = tuple(Media(kind, value) for value in values)
            messages[at] = messages[at]._replace(parts=first + messages[at].parts)
            continue
        if n != len(values):
            raise BadSample(f"{kind}: {len(values)} of them for {n} places {mark}")
        messages = placed
    return messages
