"""Which template a conversation is written with, and what that template was seen to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mm.data.chat.conversation import ASSISTANT, Conversation, Media, Message
from mm.data.chat.sandbox import TODAY, RefusedConversation, TemplateError
from mm.data.chat.template import DEFAULT, END, JINJA, OWN, ChatTemplate
from mm.data.modalities.base import table
from mm.errors import UserError
from mm.reading import parse_json

LOOKS_SPECIAL = re.compile(r"<[|\uff5c][^|<>\s]{1,40}[|\uff5c]>|</?s>|<(?:start|end)_of_turn>")
DATE = "2024-07-26"  # the day of templates that will not write without one
MEND = "give another with --template FILE, or --template default"
THINKING = "enable_thinking"  # the variable with which templates leave out a thought
WORDS = ("Qwalt", "Zirmo", "Vexat", "Jolpu")  # of no template
THOUGHT = "Wubbe"


class Special(NamedTuple):
    """What a text tokenizer says of the tokens that a template may write."""

    bos: str = ""
    eos: str = ""
    tokens: tuple[str, ...] = ()  # which a text must not hold
    known: tuple[str, ...] = ()  # all that are one id


def special_tokens(tokenizer: Any) -> Special:
    """The special tokens of a text tokenizer; none of one of this project."""
    beside = getattr(tokenizer, "beside", None)
    if beside is None:
        return Special()
    settings = _tokenizer_config(beside)
    inner, config = tokenizer.inner, tokenizer.config
    added = inner.get_added_tokens_decoder()
    written = lambda name: _word(settings.get(name))
    name = lambda i: added[i].content if i in added else ""
    return Special(
        written("bos_token") or name(config.bos),
        written("eos_token") or name(next(iter(config.eos), None)),
        tuple(sorted(t.content for t in added.values() if t.special)),
        tuple(sorted(t.content for t in added.values())),
    )


def template_of(tokenizer: Any, given: Path | None = None, thinking: bool = False) -> ChatTemplate:
    """The template that a conversation is written with.

    Args:
        tokenizer: of text; one that came with a model may bring its template.
        given: a Jinja file in its place; ``default`` is this project's.
        thinking: turns hold thoughts; else a template that can is told to leave out empty ones.
    Raises:
        UserError: no template, one that ends no turn, or that writes tokens the tokenizer lacks.
    """
    special = special_tokens(tokenizer)
    source, origin = DEFAULT, OWN
    if given is not None and str(given) != OWN:
        if not given.is_file():
            raise UserError(f"--template {given}: no such file")
        try:
            source, origin = given.read_text(encoding="utf-8"), str(given)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--template {given}: not readable ({error})") from error
    elif given is None and (own := template_beside(tokenizer)):
        source, origin = own, "the tokenizer's template"
    made = ChatTemplate(
        source=source,
        origin=Path(origin).name,
        bos=special.bos,
        eos=special.eos or END,
        tokens=special.tokens,
    )
    try:
        return probe(made, special, thinking)
    except UserError as error:
        raise UserError(f"{origin}: {error}; {MEND}") from error


def template_beside(tokenizer: Any) -> str:
    """The Jinja source that came with a tokenizer; "" without one."""
    beside = getattr(tokenizer, "beside", None) or {}
    if JINJA in beside:
        return beside[JINJA].decode("utf-8", "replace")
    found = _tokenizer_config(beside).get("chat_template")
    if isinstance(found, list):  # several, each with a name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else ""


def probe(template: ChatTemplate, special: Special, thinking: bool) -> ChatTemplate:
    """The template with what it was seen to do. Raises UserError where it cannot be trained."""
    made = _lists(template)
    thinks = thinking and THINKING in template.source
    try:
        made = _turns(made, special, thinks)
    except TemplateError:
        if thinks or THINKING not in template.source:
            raise
        quiet = {"arguments": {**made.arguments, THINKING: False}}
        made = _turns(made.model_copy(update=quiet), special, thinks)
    text = made.texts(_talk(), [(4, False)])[0]
    missing = sorted({w for w in LOOKS_SPECIAL.findall(text) if w not in special.known})
    if missing:
        raise TemplateError(
            f"writes {', '.join(missing)}, which the tokenizer has no id for: the model would "
            "read and write it letter by letter"
        )
    return made.model_copy(update={"places": _places(made)})


def _lists(template: ChatTemplate) -> ChatTemplate:
    """Whether it takes texts as they are or lists of parts alone, and whether it needs a day."""
    for lists in (False, True):
        made = template.model_copy(update={"lists": lists})
        try:
            text = made.texts(_talk(), [(4, False)])[0]
        except RefusedConversation as error:
            refused = str(error)
            if "'strftime_now' is undefined" in refused and TODAY not in template.arguments:
                return _lists(template.model_copy(update={"arguments": {TODAY: DATE}}))
            continue
        if all(word in text for word in WORDS):
            return made
        refused = "what the user and the assistant say does not stand in its text"
    raise TemplateError(f"cannot write a plain conversation ({refused})")


def _turns(template: ChatTemplate, special: Special, thinks: bool) -> ChatTemplate:
    """Where a turn of the assistant begins and what ends it."""
    cuts = [(4, False), (3, True), (3, False)]
    try:
        full, prompt, asked = template.texts(_talk(THOUGHT if thinks else ""), cuts)
    except RefusedConversation as error:
        raise TemplateError(f"cannot write a plain conversation ({error})") from error
    *_, third, last = WORDS
    said = full[len(prompt) :].lstrip()
    if not full.startswith(prompt) or not (thinks or said.startswith(last)):
        raise TemplateError(
            "its generation prompt is not what its own turns begin with: serving would ask "
            f"after {prompt[-40:]!r}, training would answer after "
            f"{full[: full.rfind(last)][-40:]!r}"
        )
    header = prompt[len(asked) :] if prompt.startswith(asked) else ""
    tail = full[full.rfind(last) + len(last) :].strip()
    stop = next((t for t in (END, *special.known) if tail.startswith(t)), tail)
    if not stop:
        raise TemplateError("ends no turn of the assistant: a model would never stop")
    header = header or prompt[prompt.rfind(third) + len(third) :]
    told = _after_tool(template, special)
    told = "" if told.endswith(header) else told
    return template.model_copy(update={"header": header, "tool_header": told, "stop": stop})


def _after_tool(template: ChatTemplate, special: Special) -> str:
    """What a turn of the assistant begins after where a tool spoke before it; "" for no tools."""
    first, _, third, _ = WORDS
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}
    talk = Conversation(
        (
            Message("user", (first,)),
            Message(ASSISTANT, (), {"tool_calls": [call]}),
            Message("tool", (third,), {"tool_call_id": "abcdefghi", "name": "f"}),
        )
    )
    try:
        (asked,) = template.texts(talk, [(3, True)])
    except RefusedConversation:
        return ""
    tail = asked[asked.rfind(third) + len(third) :] if third in asked else ""
    return next((word for word in special.known if tail.endswith(word)), tail)


def _places(template: ChatTemplate) -> dict[str, str]:
    """What it writes for each modality in a list of parts, where it knows it."""
    found, (first, second, *_) = {}, WORDS
    for kind in (m for m in table().modalities if m != "text"):
        asked = Conversation((Message("user", (first, Media(kind, ""), second)),))
        try:
            knowing = template.model_copy(update={"places": {kind: "known"}})
            text = knowing.texts(asked, [(1, False)])[0]
        except RefusedConversation:
            continue
        place, _, _ = text.partition(first)[2].partition(second)
        if second in text.partition(first)[2] and place.strip() and "type" not in place:
            found[kind] = place.strip()
    return found


def _talk(thought: str = "") -> Conversation:
    roles = ("user", ASSISTANT) * 2
    messages = [Message(r, (w,)) for r, w in zip(roles, WORDS, strict=True)]
    if thought:
        messages[-1] = messages[-1]._replace(more={"reasoning_content": thought})
    return Conversation(tuple(messages))


def _tokenizer_config(beside: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        found = parse_json(beside.get("tokenizer_config.json", b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _word(value: Any) -> str:
    """A token as `tokenizer_config.json` writes it: a word, or a mapping with its content."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""
