"""What tasks ask of a generator, and what they read from its answers, by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mm.tasks import harness
from mm.tasks.recognition import Recognition


class Says:
    """A generator of bytes that continues every prompt by the same words."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def encode(self, modality: str, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, modality: str, spans: list[np.ndarray]) -> list[str]:
        return [bytes(span).decode() for span in spans]

    def generate(self, prompts: list[dict[str, str]], to: str, **settings: Any) -> list[str]:
        self.asked = {"prompt": prompts[0][to], **settings}
        return [prompts[0][to] + " one two three"]


def answer(context: str, max_tokens: int = 100, **settings: Any) -> tuple[str, dict[str, Any]]:
    generator = Says()
    scorer: Any = SimpleNamespace(generator=generator, modality="text", max_tokens=max_tokens)
    return harness.Scorer.answer(scorer, context, settings), generator.asked


@pytest.mark.parametrize(
    ("until", "said"),
    [
        (["three", "two", "four"], " one "),
        ("three", " one two "),
        (["", "four"], " one two three"),
        (None, " one two three"),
    ],
)
def test_an_answer_ends_before_the_first_of_the_words(until: Any, said: str) -> None:
    assert answer("so", until=until)[0] == said


def test_a_context_loses_its_beginning_to_the_room_of_the_answer() -> None:
    said, asked = answer("abcdef", max_tokens=10, max_gen_toks=6)
    assert (said, asked["prompt"], asked["max_tokens"]) == (" one two three", "cdef", 6)
    assert answer("abcd", max_tokens=10, max_gen_toks=6)[1]["prompt"] == "abcd"
    assert answer("abcd", max_tokens=10, max_gen_toks=20)[1]["prompt"] == "d"


@pytest.mark.parametrize(
    ("settings", "temperature", "top_p"),
    [
        ({"top_p": 0.5}, 0.0, 1.0),
        ({"temperature": 0.7, "top_p": 0.5}, 0.7, 0.5),
        ({"do_sample": True}, 1.0, 1.0),
        ({"temperature": 0.0, "top_p": 0.5}, 0.0, 1.0),
    ],
)
def test_an_answer_is_greedy_unless_it_is_to_be_drawn(
    settings: dict[str, Any], temperature: float, top_p: float
) -> None:
    asked = answer("so", **settings)[1]
    assert (asked["temperature"], asked["top_p"]) == (temperature, top_p)
    assert asked["max_tokens"] == 256


@pytest.mark.parametrize(
    ("sources", "read"),
    [(("audio", "text"), "audio"), (("text", "image"), "image"), (("text",), "text")],
)
def test_the_linear_probe_reads_pictures_or_what_is_given_first(
    sources: tuple[str, ...], read: str
) -> None:
    assert Recognition(data=Path("data"), sources=sources)._probed == read
