"""What tasks ask of a generator, and what they read from its answers, by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mm.batch import Batch
from mm.errors import UserError
from mm.registry import TASKS
from mm.specs import TokenSpec
from mm.tasks import forecast, harness, retrieval, token_loss, transcription
from mm.tasks.recognition import Recognition
from mm.vocabulary import extend_vocabulary


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


def test_edits_are_counted_a_word_over_all_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items 0 and 4 lack one of the two, 3 is silence; they are read two at a time."""
    said = {1: "a b c", 2: "d e", 3: ""}
    told = {1: ["a", "x", "c"], 2: ["d", "e", "g"], 3: []}
    lengths = {"audio": [-1, 9, 9, 0, 9], "text": [1, 5, 3, 0, -1]}
    shards = SimpleNamespace(
        having=lambda raw: [i for i, n in enumerate(lengths[raw]) if n >= 0],
        lengths=lengths.get,
        value=lambda i, raw: said[i] if raw == "text" else i,
    )
    reads: list[list[int]] = []

    def read(task: Any, generator: Any, codes: list[int]) -> list[list[str]]:
        reads.append(codes)
        return [told[i] for i in codes]

    monkeypatch.setattr(transcription, "open_split", lambda *given: shards)
    monkeypatch.setattr(transcription.Transcription, "_read", read)
    generator: Any = SimpleNamespace(
        model=SimpleNamespace(heads={"text": None}),
        tokenizers={},
        encode=lambda modality, raws: raws,
    )
    figures = transcription.Transcription(data=Path("data"), rows=2).evaluate(generator)
    assert reads == [[1, 2], [3]]
    assert figures == {
        "audio_to_text_word_error_rate": pytest.approx(2 / 5),
        "audio_to_text_exact": pytest.approx(1 / 3),
        "audio_to_text_words": 5,
    }


@pytest.mark.parametrize(
    ("said", "told", "edits"),
    [("a b c", "a b c", 0), ("a b c", "", 3), ("", "a", 1), ("a b c d", "b c x d", 2)],
)
def test_edits_by_hand(said: str, told: str, edits: int) -> None:
    assert transcription.edit_distance(said.split(), told.split()) == edits


WORDS = extend_vocabulary([TokenSpec("text", 3), TokenSpec("image", 4)])


class Embeds(torch.nn.Module):
    """Says of the end of a span which code stands before it; all that it reads is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.heads = {"embedding": None}
        self.rows: list[int] = []

    def forward(self, b: Batch, heads: Any, loss: bool) -> Any:
        assert heads == ("embedding",) and not loss
        assert not b.weight.any() and b.layout.fields.extra["prefix"].bool().any()
        self.rows.append(len(b.ids))
        ids, at = b.ids.flatten(), b.places["embedding"].long()
        ends = {WORDS.range(m).end: WORDS.range(m).first for m in ("text", "image")}
        codes = [int(ids[i - 1]) - ends[int(ids[i])] for i in at]
        mean = torch.eye(4)[codes]
        return SimpleNamespace(
            heads={"embedding": SimpleNamespace(dist=SimpleNamespace(mean=mean))}
        )


def test_an_item_finds_the_name_of_the_likest_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second item is taken for a one."""
    images = [([3, 0], "zero"), ([1], "two"), ([1, 0, 2], "two")]
    items = [
        SimpleNamespace(sample=SimpleNamespace(values={"image": np.array(codes)}), label=label)
        for codes, label in images
    ]
    names = ("zero", "one", "two")
    as_codes = lambda raw: np.array([names.index(raw)]) if isinstance(raw, str) else raw
    model = Embeds()
    generator: Any = SimpleNamespace(
        model=model,
        vocabulary=WORDS,
        tokenizers={"image": None},
        encode=lambda modality, raws: [as_codes(raw) for raw in raws],
    )
    asked: list[Any] = []
    monkeypatch.setattr(
        retrieval, "read_items", lambda *given, **settings: asked.extend((given, settings)) or items
    )
    task = retrieval.Retrieval(data=Path("data"), classes=names, rows=2, label="kind", limit=9)
    assert task.evaluate(generator) == {
        "image_to_text_recall_at_1": pytest.approx(2 / 3),
        "image_to_text_chance": pytest.approx(2 / 3),
        "image_to_text_n": 3,
    }
    assert model.rows == [2, 1, 2, 1]
    want = {"classes": names, "label": "kind", "limit": 9, "tokenizers": generator.tokenizers}
    assert asked == [(Path("data"), "test", ("image",)), want]


def test_a_forecast_is_the_mean_or_the_median_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, int]] = []

    def draw(*what: Any, **settings: Any) -> list[np.ndarray]:
        asked.append((settings["temperature"], settings["seed"]))
        each = {5: [1.0, 9.0], 6: [4.0, 2.0], 7: [2.0, 3.0]}[settings["seed"]]
        return [np.array(each) + x[-1] for x in what[3]]

    monkeypatch.setattr(forecast, "continue_series", draw)
    generator: Any = SimpleNamespace(model=None, vocabulary=None, tokenizer=lambda modality: None)
    given = [np.array([0.0, 10.0]), np.array([0.0])]
    task = forecast.Forecast(data=Path("data"), horizon=2)
    assert [x.tolist() for x in task._told(generator, given, 5)] == [[11, 19], [1, 9]]
    assert asked == [(0.0, 5)], "nothing is drawn"
    drawn = task.model_copy(update={"samples": 3})
    assert [x.tolist() for x in drawn._told(generator, given, 5)] == [[12, 13], [2, 3]]
    assert asked[1:] == [(1.0, 5), (1.0, 6), (1.0, 7)]


def test_a_naive_forecast_repeats_the_season_before_what_is_told() -> None:
    task = forecast.Forecast(data=Path("data"), horizon=5, period=2)
    assert task._naive(np.arange(9.0)).tolist() == [2, 3, 2, 3, 2]


def test_perplexity_is_over_all_places_beside_ids_that_are_as_likely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 7 samples the first, middle and last; the middle one has no text."""
    of = {
        0: {"text": (2.0, 3), "values": (1.0, 1)},
        3: {"values": (5.0, 2)},
        6: {"text": (4.0, 1), "values": (0.0, 1)},
    }
    words = extend_vocabulary(
        [TokenSpec("text", 30), TokenSpec("values", 0, continuous=True, n_features=2)]
    )
    monkeypatch.setattr(token_loss, "open_split", lambda *given: range(7))
    monkeypatch.setattr(token_loss, "sample_segments", lambda shards, i, vocabulary: i)
    generator: Any = SimpleNamespace(vocabulary=words, nll=lambda some: [of[i] for i in some])
    assert token_loss.TokenLoss(data=Path("data"), limit=3).evaluate(generator) == {
        "text_perplexity": pytest.approx(np.exp(6 / 4)),
        "text_perplexity_n": 4,
        "text_perplexity_chance": 31.0,  # or the end
        "values_perplexity": pytest.approx(np.exp(6 / 4)),
        "values_perplexity_n": 4,
    }


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "block_decoding", "modality": "audio"},
        {"kind": "forecast", "modality": "audio"},
        {"kind": "text_error", "sources": ["audio"]},
        {"kind": "text_error", "sources": ["image"], "to": "audio"},
        {"kind": "transcription"},
        {"kind": "transcription", "source": "image", "to": "audio"},
    ],
)
def test_a_modality_that_the_run_lacks_is_named_first(asked: dict[str, Any]) -> None:
    task = TASKS.parse({"data": "no/such/data"} | asked).build()
    with pytest.raises(UserError, match="the vocabulary has no modality 'audio'"):
        task.check(WORDS, {"image": None})
