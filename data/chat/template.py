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
from mm.data.chat.sandbox import SECONDS, RefusedConversation, Sandbox
from mm.data.modalities.base import BadSample
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


class TextPart(NamedTuple):
    """A text segment: pieces that are encoded apart, each with whether it is learnt."""

    pieces: tuple[tuple[str, bool], ...]
    end: bool  # the segment's own end is learnt: it stops a turn


class MediaPart(NamedTuple):
    """A segment of another modality."""

    media: Media
    learnt: bool


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
    tool_header: str = ""  # likewise after what a tool said, where that is another
    stop: str = ""  # what ends it, `END` where the segment does
    lists: bool = False  # contents are lists even where they are text alone
    places: dict[str, str] = {}  # modality -> what stands in a text where its items do
    seconds: int = SECONDS

    @cached_property
    def sandbox(self) -> Sandbox:
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

    def variables(self, tools: Any) -> dict[str, Any]:
        return {"bos_token": self.bos, "eos_token": self.eos, "tools": tools, **self.arguments}

    def message(self, message: Message, places: Mapping[str, str]) -> dict[str, Any]:
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

    def texts(self, conversation: Conversation, cuts: Sequence[tuple[int, bool]]) -> list[str]:
        messages = [self.message(m, self.places) for m in conversation.messages]
        return self.sandbox.render(messages, self.variables(conversation.tools), cuts)

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
        last = max((i for i in turns if conversation.messages[i].learnt), default=-1)
        whole = (len(conversation.messages), prompt)
        cuts = [cut for i in turns for cut in ((i, True), (i + 1, False))]
        try:
            full, *texts = self.texts(conversation, [whole, *cuts])
        except RefusedConversation as error:
            raise BadSample(f"the template refuses it: {error}") from error
        spans: list[tuple[int, int]] = []
        for turn, before, after in zip(turns, texts[::2], texts[1::2], strict=True):
            if not conversation.messages[turn].learnt:
                continue
            at = full.find(self.stop, len(before)) if full.startswith(before) else -1
            end = at + len(self.stop)
            if at < 0 or full[:end] != after[:end]:
                if turn == last and not prompt:
                    raise BadSample(
                        f"message {turn}: the template writes another text before it than it asks "
                        "a server to: it cannot be learnt"
                    )
                continue  # as it stands in a history, a server never asks for it
            spans.append((len(before), end))
        told = conversation.messages
        if not prompt:
            full, told = full[: spans[-1][1]], told[: last + 1]
        media = [p for m in told for p in m.parts if isinstance(p, Media)]
        return list(self._split(full, spans, media))

    def _check_words(self, conversation: Conversation) -> None:
        words = (*self.tokens, END, OPEN, CLOSE)
        words += (self.stop,) if self.stop not in words else ()
        for number, message in enumerate(conversation.messages):
            for part in (*message.parts, *message.more.values()):
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
