"""Refuses, before the first step, a loss that is not on what the assistant says.

It looks at documents as a stream makes them, after every transform, and knows nothing of how they
were packed but the template: what it finds in their text must be what their weights say.

L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mm.data.batching.document import DocumentTokens, document_tokens
from mm.data.chat.show import decode_text, learnt_tokens
from mm.data.chat.template import END, ChatTemplate
from mm.errors import UserError
from mm.specs import ModalityTokenizer, Segment
from mm.vocabulary import Vocabulary

AROUND = 32  # tokens about a border in which it is looked for


class Gate:
    """What a stream of conversations is held against.

    Args:
        template: that they were packed with.
        tokenizer: of their text.
        vocabulary: of the run.
        every: they were packed to learn all tokens.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: ModalityTokenizer,
        vocabulary: Vocabulary,
        every: bool = False,
    ):
        self.template, self.tokenizer, self.vocabulary = template, tokenizer, vocabulary
        self.every = every
        self.range = vocabulary.range(tokenizer.spec.modality)

    def fault(self, segments: Sequence[Segment]) -> str:
        """What is wrong with the loss of a document; "" where it is as it should be."""
        document = document_tokens([s for s in segments if not s.part], self.vocabulary)
        learnt = learnt_tokens(document)
        if not learnt.any():
            return "no token of it is learnt"
        begins = np.isin(
            document.ids, [self.vocabulary.range(m).begin for m in self.vocabulary.modalities]
        )
        if learnt[~begins].all() and not self.every:
            return "all of its tokens are learnt, what the user says among them"
        own = learnt & (document.modality == self.range.index)
        if self.every:
            return ""
        return next(self._faults(document, own), "")

    def _faults(self, document: DocumentTokens, own: np.ndarray) -> Iterator[str]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], own.astype(np.int8), [0]])))
        for first, stop in edges.reshape(-1, 2).tolist():
            begin = self._begin(document, first)
            resumed = first == begin + 1 and begin > 0 and self._is_media(document, begin - 1)
            if not resumed and (fault := self._at_start(document, begin, first, stop)):
                yield fault
            broken = stop < len(own) and document.ids[stop] == self.range.end
            if not (broken and stop + 1 < len(own) and self._is_media(document, stop + 1)):
                yield from self._at_end(document, first, stop)

    def _at_start(self, document: DocumentTokens, begin: int, first: int, stop: int) -> str:
        """A loss that does not begin where a turn does."""
        header = self.template.header
        after = lambda at: self._text(document, begin, at).endswith(header)
        if after(first):
            return ""
        for off in range(1, AROUND):
            for at, where in ((first + off, "before"), (first - off, "after")):
                if begin < at <= len(document.ids) and after(at):
                    return (
                        f"its loss begins {off} token{'s' * (off > 1)} {where} what the assistant "
                        f"says: {self._text(document, first, min(stop, first + 8))!r}"
                    )
        return f"its loss begins at {self._text(document, first, min(stop, first + 8))!r}, no turn"

    def _at_end(self, document: DocumentTokens, first: int, stop: int) -> Iterator[str]:
        """A loss that does not end with what stops a turn."""
        said, word = self._text(document, first, stop), self.template.stop
        if said.endswith(word) and said.count(word) == 1:
            return
        if word in said:
            over = said[said.index(word) + len(word) :]
            yield f"its loss goes on after {_name(word)}, which ends the turn: {over[:40]!r}"
            return
        for off in range(1, AROUND):
            if stop + off <= len(document.ids) and word in self._text(document, first, stop + off):
                if off <= len(word) and self._text(document, stop, stop + off).startswith(word):
                    yield f"{_name(word)}, which stops a turn, is not learnt"
                else:
                    yield f"its loss ends {off} tokens before a turn does"
                return
        yield f"its loss ends at {said[-40:]!r}, where no turn does"

    def _begin(self, document: DocumentTokens, at: int) -> int:
        """The begin of the text segment that a place is in."""
        before = np.flatnonzero(document.ids[: at + 1] == self.range.begin)
        return int(before[-1]) if len(before) else -1

    def _is_media(self, document: DocumentTokens, at: int) -> bool:
        return int(document.modality[at]) not in (0, self.range.index)

    def _text(self, document: DocumentTokens, first: int, stop: int) -> str:
        """Text of the places ``first`` to ``stop`` of one segment; its end is `END`."""
        ids, r = document.ids[first:stop], self.range
        codes = ids[(ids >= r.first) & (ids < r.stop)] - r.first
        return decode_text(self.tokenizer, codes) + (END if r.end in ids else "")


def _name(stop: str) -> str:
    return "the end of the text segment" if stop == END else repr(stop)


def require_one_template(found: Sequence[tuple[str, ChatTemplate]]) -> None:
    """Raise UserError where two places write conversations otherwise: name -> template."""
    if not found:
        return
    name, first = found[0]
    for other, template in found[1:]:
        if template.fingerprint != first.fingerprint:
            raise UserError(
                f"{name} and {other} write conversations with different chat templates "
                f"({first.origin}: {_brief(first)}; {template.origin}: {_brief(template)}): a "
                "server can ask with one alone"
            )


def _brief(template: ChatTemplate) -> str:
    return f"turns begin after {template.header!r} and end with {_name(template.stop)}"
