"""What transforms make of the segments of a document: tasks, windows, chains."""

from __future__ import annotations

import numpy as np
import pytest

from mm.data.streams.shuffle import generator
from mm.data.transforms.any_to_any import AnyToAnyConfig, parse_task
from mm.data.transforms.chunk import ChunkConfig, window
from mm.data.transforms.compose import chain
from mm.data.transforms.delay import DelayConfig
from mm.data.transforms.mark import MarkConfig
from mm.data.transforms.preference import PreferenceConfig
from mm.errors import UserError
from mm.specs import Segment


def segments(*modalities: str) -> list[Segment]:
    return [Segment(m, np.arange(3)) for m in modalities]


def test_any_to_any_draws_possible_tasks_by_weight() -> None:
    tasks = {
        "image>text": 3.0,
        "text>image": 1.0,
        "image+text>audio": 5.0,
        "audio": 1.0,
        "text": 0.0,
    }
    transform = AnyToAnyConfig(tasks=tasks, condition_dropout=0.2).build()
    counts: dict[str, int] = {}
    null = 0
    for i in range(4000):
        out = transform(segments("text", "image"), generator(0, i))
        assert out is not None and [s.role for s in out] == ["condition", "target"]
        assert out[1].ids is not None
        null += out[0].ids is None
        name = f"{out[0].modality}>{out[1].modality}"
        counts[name] = counts.get(name, 0) + 1
    assert set(counts) == {"image>text", "text>image"}
    assert abs(counts["image>text"] / 4000 - 0.75) < 0.03 and abs(null / 4000 - 0.2) < 0.03
    assert transform(segments("text"), generator(0)) is None, "nothing fits: filtered"
    everything = [transform(segments("audio", "image", "text"), generator(1, i)) for i in range(50)]
    both = next(o for o in everything if o is not None and len(o) == 3)
    assert [s.modality for s in both] == ["image", "text", "audio"], "in the task's order"
    assert both[0].role == both[1].role == "condition"
    assert any(o is not None and len(o) == 1 and o[0].modality == "audio" for o in everything)


def test_any_to_any_gives_the_roles_whatever_they_were() -> None:
    given = [s._replace(role="condition") for s in segments("text", "image")]
    transform = AnyToAnyConfig(tasks={"image>text": 1.0}, condition_dropout=0).build()
    out = transform(given, generator(0))
    assert out is not None and [s.role for s in out] == ["condition", "target"]


def test_a_dropout_of_nothing_drops_nothing_whatever_is_drawn() -> None:
    class Zeros:
        def random(self, n: int) -> np.ndarray:
            return np.zeros(n)

    transform = AnyToAnyConfig(tasks={"image>text": 1.0}, condition_dropout=0).build()
    out = transform(segments("text", "image"), Zeros())
    assert out is not None and out[0].ids is not None


def test_a_draw_above_all_borders_takes_the_last_task() -> None:
    """Six shares of 1 / 6 sum to a little less than 1."""

    class Ones:
        def random(self, n: int) -> np.ndarray:
            return np.nextafter(np.ones(n), 0)

    names = ["a", "b", "c", "d", "e", "f"]
    assert sum([1 / 6] * 6) < 1
    transform = AnyToAnyConfig(tasks=dict.fromkeys(names, 1.0), condition_dropout=0).build()
    out = transform(segments(*names), Ones())
    assert out is not None and [s.modality for s in out] == ["f"]


def test_any_to_any_is_pure() -> None:
    transform = AnyToAnyConfig.smallest().build()
    given = segments("text", "image")
    a = [transform(given, generator(i)) for i in range(20)]
    b = [transform(given, generator(i)) for i in reversed(range(20))][::-1]
    key = lambda out: [(s.modality, s.role, s.ids is None) for s in out]
    assert [key(o) for o in a] == [key(o) for o in b]
    assert all(s.role == "target" for s in given)


@pytest.mark.parametrize("text", ["", ">", "image>", ">text", "image>image", "a++b>c"])
def test_task_names_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        parse_task(text)


def test_chunk_windows() -> None:
    transform = ChunkConfig(tokens=4).build()
    long = Segment("text", np.arange(10))
    starts = set()
    for i in range(200):
        (out,) = transform([long], generator(i)) or []
        starts.add(int(out.ids[0]))
        np.testing.assert_array_equal(out.ids, np.arange(out.ids[0], out.ids[0] + 4))
        cut = out.ids[-1] != 9
        assert (out.targets is not None) == cut
        if cut:
            assert out.targets.tolist() == [*out.ids.tolist(), -1], "the end is no target"
    assert starts == set(range(7))
    first = ChunkConfig(tokens=4, window="first").build()
    assert first([long], None)[0].ids.tolist() == [0, 1, 2, 3]
    image = Segment("image", np.arange(9))
    assert first([image, Segment("text", np.arange(3))], None)[0] is image


def test_chain_of_configs_and_objects() -> None:
    both = chain(
        [{"kind": "chunk", "tokens": 2}], None, AnyToAnyConfig(tasks={"text": 1.0}).build()
    )
    out = both(segments("text", "image"), generator(0))
    assert out is not None and [(s.modality, len(s.ids)) for s in out] == [("text", 2)]
    assert (
        chain(AnyToAnyConfig(tasks={"audio": 1.0}), "chunk")(segments("text"), generator(0)) is None
    )


def test_the_last_two_items_of_a_sample_are_a_preference() -> None:
    """Prompt and better answer are the document, prompt and worse one its second sequence."""
    transform = PreferenceConfig(part="worse").build()
    rng = np.random.default_rng(0)
    made = transform([Segment("text", [1]), Segment("image", [2]), Segment("image", [3])], rng)
    assert made is not None and transform.makes_parts == ("worse",)
    assert [(s.modality, s.ids, s.role, s.part) for s in made] == [
        ("text", [1], "condition", ""),
        ("image", [2], "target", ""),
        ("text", [1], "condition", "worse"),
        ("image", [3], "condition", "worse"),
    ]
    assert transform([Segment("text", [1]), Segment("image", [2])], rng) is None
    assert transform([Segment(m, [1]) for m in ("text", "image", "text")], rng) is None
    assert transform([Segment("image", [2])], rng) is None
    turns = transform([Segment("text", [n], role="condition") for n in range(3)], rng)
    assert turns is not None
    assert [s.role for s in turns] == ["condition", "target", "condition", "condition"]
    pair = transform([Segment("image", [2]), Segment("image", [3])], rng)
    assert pair is not None and [s.part for s in pair] == ["", "worse"]


def test_segments_are_numbered_in_their_order_but_for_labels() -> None:
    given = [*segments("text", "image", "text", "image"), Segment("text", np.arange(2))]
    given[2] = given[2]._replace(role="label", fields={"own": 7})
    of = lambda **settings: [
        dict(s.fields) for s in MarkConfig(**settings).build()(given, None) or []
    ]
    label = {"own": 7}
    assert of() == [{"segment": 1}, {"segment": 2}, label, {"segment": 3}, {"segment": 4}]
    assert of(field="n", modalities=("text",)) == [{"n": 1}, {}, label, {}, {"n": 2}]


def test_a_number_of_the_whole_segment_may_be_laid_out_one_a_code_may_not() -> None:
    """Two codebooks of three frames: the second one place later."""
    delay = DelayConfig(delays={"audio": (0, 1)}).build()
    given = Segment("audio", np.arange(6), fields={"segment": 2})
    (made,) = delay([given])
    assert made.ids.tolist() == [[0, -1], [2, 1], [4, 3], [-1, 5]] and made.fields == {"segment": 2}
    for more in ({"fields": {"masked": np.zeros(6, bool)}}, {"position": np.arange(6)}):
        with pytest.raises(UserError, match="'audio' was masked or placed code by code"):
            delay([given._replace(**more)])
    (cut,) = delay([given._replace(targets=np.array([*range(6), -1]))])
    assert cut.targets.tolist() == [*made.ids.tolist(), [-1, -1]]


def test_a_window_of_places_of_several_codebooks_predicts_by_the_first() -> None:
    """One target a place; the others predict themselves."""
    given = Segment("audio", np.array([[0, -1], [2, 11], [4, 13], [-1, 15]]))
    made = window(given, 1, 3)
    assert made.ids.tolist() == [[2, 11], [4, 13]] and made.targets.tolist() == [2, 4, -1]
    assert window(given, 2, 4).targets is None
