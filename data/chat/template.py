"""ChatTemplate: a conversation as the text that a model reads, and which of it the model writes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from mm.config import Config, validate
from mm.data.chat.conversation import ASSISTANT, Conversation, Media, Message
from mm.data.chat.sandbox import SECONDS, RefusedConversation, Sandbox, TemplateError
from mm.data.modalities.base import BadSample, table
from mm.errors import UserError
from mm.reading import parse_json

FILE = "chat.json"  # beside a vocabulary
OWN, JINJA = "default", "chat_template.jinja"
# Characters that no text holds: the end of a text segment, and a place of media.
END, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
DEFAULT = """\
{%- for message in messages -%}
{%- if not loop.first -%}{{ '\\n\\n' }}{%- endif -%}
{{ '### ' + (message.role | capitalize) + '\\n' + message.content }}
{%- if message.role == 'assistant' -%}{{ eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n\\n### Assistant\\n' }}{%- endif -%}
"""
LOOKS_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:start|end)_of_turn>")
MEND = "give another with --template FILE, or --template default"


class TextPart(NamedTuple):
    """A text segment: pieces that are encoded apart, each with whether it is learnt."""

    pieces: tuple[tuple[str, bool], ...]
    end: bool  # the segment's own end is learnt: it stops a turn


class MediaPart(NamedTuple):
    """A segment of another modality."""

    media: Media
    learnt: bool


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


def template_of(tokenizer: Any, given: Path | None = None) -> ChatTemplate:
    """The template that a conversation is written with.

    Args:
        tokenizer: of text; one that came with a model may bring its template.
        given: a Jinja file in its place; ``default`` is this project's.
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
        return made.probe(special)
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


class ChatTemplate(Config):
    """A template with all that its text depends on, and what it was seen to do.

    It is saved beside the vocabulary, so that a server writes a prompt as training did.
    """

    source: str
    origin: str = OWN
    bos: str = ""
    eos: str = END
    arguments: Annotated[dict[str, Any], Field(description="more variables of the template")] = {}
    tokens: tuple[str, ...] = ()  # that no message may hold
    header: str = ""  # what a turn of the assistant begins after
    stop: str = ""  # what ends it, `END` where the segment does
    lists: bool = False  # contents are lists even where they are text alone
    places: dict[str, str] = {}  # modality -> what stands in a text where its items do
    seconds: float = SECONDS

    @cached_property
    def _sandbox(self) -> Sandbox:
        return Sandbox(self.source, self.seconds)

    @property
    def fingerprint(self) -> str:
        """Changes when the text of a conversation may."""
        parts = [self.source, self.bos, self.eos, self.arguments, self.stop]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `FILE`."""
        values = self.model_dump(mode="json") | {"sha256": self.fingerprint}
        part = folder / f"{FILE}.part"
        part.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """What `save` wrote; None where there is none. Raises UserError on a damaged one."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
            mark = values.pop("sha256")
            made = validate(cls, values, str(path))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{path}: no chat template ({str(error)[:120]}); pack the data again"
            ) from error
        if made.fingerprint != mark:
            raise UserError(
                f"{path}: does not match its own hash: it was edited; pack the data again with "
                "--template FILE"
            )
        return made

    # ---- what it does ----

    def probe(self, special: Special) -> ChatTemplate:
        """The template with what it was seen to do. Raises UserError where it cannot be trained."""
        made = self._probe_lists()
        try:
            made = made._probe_turns(special)
        except TemplateError:
            if "enable_thinking" not in self.source:
                raise
            quiet = made.model_copy(update={"arguments": {"enable_thinking": False}})
            made = quiet._probe_turns(special)
        text = made._texts(_probe(), [(4, False)])[0]
        missing = sorted({w for w in LOOKS_SPECIAL.findall(text) if w not in special.known})
        if missing:
            raise TemplateError(
                f"writes {', '.join(missing)}, which the tokenizer has no id for: the model would "
                "read and write it letter by letter"
            )
        return made.model_copy(update={"places": made._probe_places()})

    def _probe_lists(self) -> ChatTemplate:
        """Whether it takes texts as they are, or lists of parts alone."""
        for lists in (False, True):
            made = self.model_copy(update={"lists": lists})
            try:
                text = made._texts(_probe(), [(4, False)])[0]
            except RefusedConversation as error:
                refused = str(error)
                continue
            if all(word in text for word in WORDS):
                return made
            refused = "what the user and the assistant say does not stand in its text"
        raise TemplateError(f"cannot write a plain conversation ({refused})")

    def _probe_turns(self, special: Special) -> ChatTemplate:
        """Where a turn of the assistant begins and what ends it."""
        try:
            full, prompt, asked = self._texts(_probe(), [(4, False), (3, True), (3, False)])
        except RefusedConversation as error:
            raise TemplateError(f"cannot write a plain conversation ({error})") from error
        *_, third, last = WORDS
        if not full.startswith(prompt) or not full[len(prompt) :].lstrip().startswith(last):
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
        return self.model_copy(
            update={"header": header or prompt[prompt.rfind(third) + len(third) :], "stop": stop}
        )

    def _probe_places(self) -> dict[str, str]:
        """What it writes for each modality in a list of parts, where it knows it."""
        found, (first, second, *_) = {}, WORDS
        for kind in (m for m in table().modalities if m != "text"):
            parts = (first, Media(kind, ""), second)
            messages = [self._message(Message("user", parts), {kind: "known"})]
            try:
                text = self._sandbox.render(messages, self._variables(None), [(1, False)])[0]
            except RefusedConversation:
                continue
            before, _, rest = text.partition(first)
            place, _, _ = rest.partition(second)
            if second in rest and place.strip() and "type" not in place:
                found[kind] = place.strip()
        return found

    def _variables(self, tools: Any) -> dict[str, Any]:
        return {"bos_token": self.bos, "eos_token": self.eos, "tools": tools, **self.arguments}

    def _message(self, message: Message, places: Mapping[str, str]) -> dict[str, Any]:
        """A message as templates take it: media as parts, or as marks in the text."""
        kinds = {p.modality for p in message.parts if isinstance(p, Media)}
        content: Any
        if self.lists or (kinds and kinds <= places.keys()):
            content = [
                {"type": "text", "text": p} if isinstance(p, str) else {"type": p.modality}
                for p in message.parts
            ]
        else:
            content = "".join(
                p if isinstance(p, str) else f"{OPEN}{p.modality}{CLOSE}" for p in message.parts
            )
        return {"role": message.role, "content": content, **message.more}

    def _texts(self, conversation: Conversation, cuts: Sequence[tuple[int, bool]]) -> list[str]:
        messages = [self._message(m, self.places) for m in conversation.messages]
        return self._sandbox.render(messages, self._variables(conversation.tools), cuts)

    def parts(self, conversation: Conversation, prompt: bool = False) -> list[TextPart | MediaPart]:
        """A conversation as segments; what follows its last learnt turn is left out.

        Args:
            prompt: it ends where the assistant would begin, and nothing of it is left out.
        Raises:
            BadSample: the template refuses it, or a message holds a token of the template.
            TemplateError: the template leaves its bounds.
        """
        self._check_words(conversation)
        turns = [i for i, m in enumerate(conversation.messages) if m.role == ASSISTANT]
        whole = (len(conversation.messages), prompt)
        try:
            full, *prompts = self._texts(conversation, [whole, *((i, True) for i in turns)])
        except RefusedConversation as error:
            raise BadSample(f"the template refuses it: {error}") from error
        spans: list[tuple[int, int]] = []
        for turn, before in zip(turns, prompts, strict=True):
            at = full.find(self.stop, len(before)) if full.startswith(before) else -1
            if at < 0:
                if turn == turns[-1] and not prompt:
                    raise BadSample(
                        f"message {turn}: the template writes another text before it than it asks "
                        "a server to: it cannot be learnt"
                    )
                continue  # as it stands in a history, a server never asks for it
            spans.append((len(before), at + len(self.stop)))
        if not prompt:
            full = full[: spans[-1][1]]
        media = [p for m in conversation.messages for p in m.parts if isinstance(p, Media)]
        return list(self._split(full, spans, media))

    def _check_words(self, conversation: Conversation) -> None:
        words = (*self.tokens, END, OPEN, CLOSE)
        words += (self.stop,) if self.stop not in words else ()
        for number, message in enumerate(conversation.messages):
            for part in message.parts:
                if isinstance(part, str) and (held := [w for w in words if w in part]):
                    raise BadSample(
                        f"message {number} holds {held[0]!r} as text, which is the template's own"
                    )

    def _split(
        self, full: str, spans: Sequence[tuple[int, int]], media: list[Media]
    ) -> Iterator[TextPart | MediaPart]:
        """Segments of a rendered conversation. Raises BadSample where media lack their places."""
        if self.bos and full.startswith(self.bos):  # a segment's own begin is it
            spans = [(a - len(self.bos), b - len(self.bos)) for a, b in spans]
            full = full[len(self.bos) :]
        marks = {f"{OPEN}{m}{CLOSE}": m for m in {p.modality for p in media}}
        marks |= {self.places[m]: m for m in marks.values() if m in self.places}
        borders = {0, len(full), *(at for span in spans for at in span)}
        cut = re.compile("|".join(map(re.escape, (END, *marks))))
        left, pieces = list(media), []
        learnt = lambda at: any(a <= at < b for a, b in spans)
        at = 0
        for found in [*cut.finditer(full), None]:
            stop = found.start() if found else len(full)
            inner = sorted({at, stop, *(b for b in borders if at < b < stop)})
            pieces += [(full[a:b], learnt(a)) for a, b in zip(inner, inner[1:], strict=False)]
            if found is None:
                break
            word, at = found.group(), found.end()
            if word == END:
                yield TextPart(tuple(pieces), learnt(stop))
                pieces = []
                continue
            if pieces:
                yield TextPart(tuple(pieces), False)
                pieces = []
            if not left or left[0].modality != marks[word]:
                raise BadSample(f"a text holds {word!r}, the template's place of {marks[word]}")
            yield MediaPart(left.pop(0), learnt(stop))
        if pieces:
            yield TextPart(tuple(pieces), False)
        if left:
            raise BadSample(f"the template leaves out {len(left)} x {left[0].modality}")


WORDS = ("Qwalt", "Zirmo", "Vexat", "Jolpu")  # of no template


def _probe() -> Conversation:
    roles = ("user", ASSISTANT) * 2
    return Conversation(tuple(Message(r, (w,)) for r, w in zip(roles, WORDS, strict=True)))


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
