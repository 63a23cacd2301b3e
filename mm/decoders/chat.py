"""Chat: the answer of a model to a conversation, asked through the template it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.data.batching.document import of_array
from mm.data.chat.conversation import Conversation, Media, read_messages
from mm.data.chat.encode import ChatEncoder, text_bytes
from mm.data.chat.show import decode_text
from mm.data.chat.template import (
    END,
    ChatTemplate,
    TextPart,
    template_beside,
    template_of,
)
from mm.data.modalities.base import BadSample, table
from mm.data.pack.encode import Item
from mm.data.shards.members import member_modality, member_name
from mm.data.sources.chat import reader
from mm.decoders.base import Rule, Session
from mm.decoders.folder import load
from mm.decoders.generate import Generator, generate_tokens
from mm.decoders.rules import NEVER
from mm.errors import UserError
from mm.specs import Segment


class Chat:
    """A `Generator` that is asked in conversations.

    Args:
        generator: with a tokenizer of text.
        template: as training wrote conversations.
    """

    def __init__(self, generator: Generator, template: ChatTemplate):
        self.generator, self.template = generator, template
        words, own = generator.vocabulary, generator.tokenizers
        raw = {m: table().raw.get(m, m) for m in words.modalities if m in own}
        self.reads = {kind: m for m, kind in reversed(raw.items())}
        if "text" not in self.reads:
            raise UserError("no tokenizer of text beside the model, so nobody can chat with it")
        self.text = self.reads["text"]
        stop = ChatEncoder({self.text: own[self.text]})
        self.stop = [] if template.stop == END else stop.pieces.encode([template.stop])[0].ids

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", *, trust_code: bool = False
    ) -> Chat:
        """Load a saved model or a run's; the template is the one beside its vocabulary.

        Raises UserError where there is none, nor one that came with its tokenizer.
        """
        loaded = load(folder, trust_code)
        generator = Generator.from_pretrained(folder, device, trust_code=trust_code)
        template = loaded.template
        texts = [m for m in loaded.tokenizers if table().raw.get(m) == "text"]
        if template is None and texts and template_beside(generator.tokenizer(texts[0])):
            template = template_of(generator.tokenizer(texts[0]))
        if template is None:
            raise UserError(
                f"{folder}: no chat template, neither of its training nor of its tokenizer: train "
                "it on conversations first: mm data pack TALKS.jsonl --out DIR --tokenizers DIR"
            )
        return cls(generator, template)

    def segments(self, messages: Sequence[Mapping[str, Any]], root: Path = Path()) -> list[Segment]:
        """A conversation as a prompt; the last segment is to go on with.

        Args:
            messages: as OpenAI's: a role and a content, text or a list of parts.
            root: folder of the files that parts name.
        Raises:
            UserError: what packing would not take either.
        """
        try:
            conversation = Conversation(read_messages(list(messages)))
            return self._segments(conversation, root)
        except BadSample as error:
            raise UserError(f"messages: {error}") from error

    def _segments(self, conversation: Conversation, root: Path) -> list[Segment]:
        parts = self.template.parts(conversation, prompt=True)
        kinds = ["text" if isinstance(p, TextPart) else p.media.modality for p in parts]
        for kind in sorted(set(kinds) - self.reads.keys()):
            raise BadSample(f"this model reads no {kind}, only {', '.join(sorted(self.reads))}")
        raws = {
            member_name(n, kind): text_bytes(part, [])
            if isinstance(part, TextPart)
            else self._file(part.media, root)
            for n, (kind, part) in enumerate(zip(kinds, parts, strict=True))
        }
        tokenizers = {self.reads[k]: self.generator.tokenizers[self.reads[k]] for k in set(kinds)}
        (found,) = ChatEncoder(tokenizers).encode([Item(raws, None)])
        if found.bad:
            raise BadSample(found.bad)
        out = []
        for member, code in found.encoded.items():
            spec = self.generator.vocabulary.spec(member_modality(member))
            array = code.ids if code.values is None else code.values
            out.append((member, of_array(spec, array)._replace(role="condition")))
        out = [segment for _, segment in sorted(out, key=lambda pair: pair[0])]
        out = [s for s in out if len(s.ids)]
        ended = isinstance(parts[-1], TextPart) and parts[-1].end
        if out and out[-1].modality == self.text and not ended:
            return [*out[:-1], out[-1]._replace(role="target")]
        return [*out, Segment(self.text, np.empty(0, np.int32), role="target")]

    def _file(self, media: Media, root: Path) -> bytes:
        return reader(media, root)()

    def answer(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        root: Path = Path(),
        **settings: Any,
    ) -> list[str]:
        """The assistant's next turn of each conversation.

        ``settings``: see `generate_tokens`.
        """
        prompts = [self.segments(messages, root) for messages in conversations]
        rules = [*settings.pop("rules", ()), *([after(self.stop)] if len(self.stop) else [])]
        words = self.generator.vocabulary
        spans = generate_tokens(
            self.generator.model, words, prompts, self.text, rules=rules, **settings
        )
        tokenizer, out = self.generator.tokenizer(self.text), []
        for prompt, span in zip(prompts, spans, strict=True):
            said = decode_text(tokenizer, span[len(prompt[-1].ids) :])
            out.append(said.partition(self.template.stop)[0])
        return out


def after(stop: Sequence[int]) -> Rule:
    """Nothing but the segment's end comes after the local ids ``stop``."""

    def rule(logits: Tensor, session: Session) -> Tensor:
        ids = session.ids
        if ids is None or ids.shape[1] < len(stop):
            return logits
        wanted = torch.as_tensor(np.asarray(stop), device=ids.device) + session.range.first
        done_N = (ids[:, -len(stop) :] == wanted).all(1)
        only_end = torch.full_like(logits, NEVER)
        only_end[:, session.range.end] = 0.0
        return torch.where(done_N[:, None], only_end, logits)

    return rule
