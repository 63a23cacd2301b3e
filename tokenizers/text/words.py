"""The words that a tokenizer of text was fitted on, so that a prompt can be warned of others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

WORDS = "words.txt"  # beside the tokenizer; no part of its fingerprint, as it changes no id
MOST = 50_000  # words that are kept; text with more of them is a language, not a list of captions
# Letters of scripts that put spaces between words; others have no words to look up.
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SPACED_BELOW = "\u0e00"


def words_of(text: str) -> list[str]:
    """Lower-case words in their order, without numbers."""
    found = _WORD.findall(text.lower().replace("\u2019", "'"))
    return [word for word in found if max(word) < _SPACED_BELOW]


class Words:
    """Collects words up to `MOST`; over that it knows nothing and warns of nothing."""

    def __init__(self, known: Iterable[str] = ()):
        self.known: set[str] | None = set(known)

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """The same texts, whose words are collected as they go by."""
        for text in texts:
            if self.known is not None:
                self.known.update(words_of(text))
                if len(self.known) > MOST:
                    self.known = None
            yield text

    def unseen(self, text: str) -> list[str]:
        """Words of ``text`` that are not known, once each; none where nothing is known."""
        if not self.known:
            return []
        return [word for word in dict.fromkeys(words_of(text)) if word not in self.known]

    def files(self) -> dict[str, bytes]:
        """File of the words, to be saved beside a tokenizer; none where nothing is known."""
        return {WORDS: "\n".join(sorted(self.known)).encode()} if self.known else {}

    @classmethod
    def read(cls, folder: str | Path | None) -> Words:
        """What `files` saved. A folder without it knows nothing."""
        file = Path(folder or ".") / WORDS
        if folder is None or not file.is_file():
            return cls()
        return cls(file.read_text(encoding="utf-8", errors="replace").split("\n"))
