"""Masks as text: what they let through, what is refused, and where they are served."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_toys import VOCABULARY, ids, make

from mm.batch import Batch
from mm.data.batching.collate import to_batch
from mm.decoders.generate import generate_tokens, sequence_nll
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal, Full, Mask
from mm.mask_expression import looks_ahead, parse_mask
from mm.model.items import number_items
from mm.objectives.next_token import NextTokenConfig
from mm.specs import Segment, TokenSpec

NUMBERS = {m: VOCABULARY.range(m).index for m in VOCABULARY.modalities}
IMAGES = "causal | (same_document & same_item & modality == image)"
RNG = np.random.default_rng(0)


def text(n: int, role: str = "target") -> Segment:
    return Segment("text", RNG.integers(0, 11, n), role=role)


def image(role: str = "condition") -> Segment:
    return Segment("image", RNG.integers(0, 7, 3), role=role)


def sees(mask: Mask, *segments: Segment) -> torch.Tensor:
    """`(L, L)`: what each token of a document sees."""
    batch = to_batch([[list(segments)]], VOCABULARY)
    f = batch.layout.fields
    f = f._replace(extra={**f.extra, "item": number_items(f, batch.ids, VOCABULARY)})
    return mask.dense(f, f)[0]


def test_an_image_sees_itself_both_ways_and_all_else_is_causal() -> None:
    """Two images side by side are two: a begin says where the second starts."""
    seen = sees(parse_mask(IMAGES, NUMBERS), text(2), image(), image(), text(1))
    wanted = torch.ones(17, 17, dtype=torch.bool).tril()
    wanted[4:9, 4:9] = wanted[9:14, 9:14] = True
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize(
    ("expression", "by_hand"),
    [
        ("causal", lambda t, s, m, p: t >= s),
        ("full", lambda t, s, m, p: t == t),
        ("causal & window(3)", lambda t, s, m, p: (t >= s) & (t - s < 3)),
        ("distance >= 0 & distance < 3", lambda t, s, m, p: (t >= s) & (t - s < 3)),
        ("causal | prefix", lambda t, s, m, p: (t >= s) | (p[t] & p[s])),
        ("causal | same_prefix & same_modality",
         lambda t, s, m, p: (t >= s) | (p[t] & p[s] & (m[t] == m[s]))),
        ("causal & ~(q.modality == text & k.modality == image)",
         lambda t, s, m, p: (t >= s) & ~((m[t] == 1) & (m[s] == 2))),
        ("(causal | prefix) & time != -1", lambda t, s, m, p: (t >= s) | (p[t] & p[s])),
        ("causal and not k.modality != 2 or k.document == 0",
         lambda t, s, m, p: (t >= s) & (m[s] == 2)),
    ],
)  # fmt: skip
def test_an_expression_is_what_its_words_say(expression: str, by_hand: object) -> None:
    segments = (text(2, "condition"), image(), text(3))
    t, s = torch.arange(14)[:, None], torch.arange(14)[None]
    modality = torch.tensor([1] * 4 + [2] * 5 + [1] * 5)
    prefix = torch.tensor([True] * 9 + [False] * 5)
    wanted = by_hand(t, s, modality, prefix).expand(14, 14)  # type: ignore[operator]
    assert torch.equal(sees(parse_mask(expression, NUMBERS), *segments), wanted)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("causal | same_itm", "no field 'itm'; did you mean 'same_item'"),
        ("causal | modalty == image", "no field 'modalty'; did you mean 'modality'"),
        ("causal | modality == imaeg", "no modality 'imaeg'; did you mean 'image'"),
        ("causal |", "is no expression such as"),
        ("__import__('os').system('true')", "cannot read"),
        ("causal if prefix else full", "cannot read"),
        ("window(-1)", "cannot read"),
        ("item == image", "cannot read 'image'"),
        ("1 < item < 3", "cannot read"),
        ("causal" + " | causal" * 100, "400 at most"),
        ("(" * 300, "is no expression"),
    ],
)
def test_what_is_no_mask_is_refused_in_one_line(expression: str, said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said) as error:
        make(mask=expression)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_field_that_the_data_have_not_is_named_with_those_they_have() -> None:
    model = make(mask="causal | same_turns", mask_fields=["turns"])
    layout = Layout.from_rows([[Doc(5, extra={"turn": [1] * 5})]])
    with pytest.raises(UserError, match="reads a field 'turns'.*did you mean 'turn'"):
        model(Batch.of_ids(ids(1, 5), layout), loss=False)
    layout = Layout.from_rows([[Doc(5, extra={"turns": [1] * 5})]])
    model(Batch.of_ids(ids(1, 5), layout), loss=False)


@pytest.mark.parametrize(
    ("mask", "modality", "ahead"),
    [
        (Causal(), 1, False),
        (Full(), 1, True),
        (parse_mask(IMAGES, NUMBERS), 1, False),
        (parse_mask(IMAGES, NUMBERS), 2, True),
        (parse_mask(f"{IMAGES} & prefix".replace("causal |", "causal | prefix &"), NUMBERS), 2,
         False),
    ],
)  # fmt: skip
def test_it_is_known_which_targets_would_see_what_they_predict(
    mask: Mask, modality: int, ahead: bool
) -> None:
    assert looks_ahead(mask, modality) is ahead


def test_such_targets_are_neither_trained_nor_generated() -> None:
    model = make(mask=IMAGES)
    objective = NextTokenConfig().build(VOCABULARY)
    with pytest.raises(UserError, match="shows a target of 'image' what it predicts"):
        objective.check_model(model)
    with pytest.raises(UserError, match="shows 'image' what comes after"):
        generate_tokens(model, VOCABULARY, [[text(2, "condition")]], "image")
    objective.check_model(make(mask="causal | (same_item & prefix)"))


def test_values_that_a_head_predicts_are_targets_too() -> None:
    """They are read both ways where they are conditions alone."""
    pixels = TokenSpec("pixels", 0, continuous=True, n_features=3, fingerprint="p")
    words = VOCABULARY.add(pixels)
    numbers = NUMBERS | {"pixels": words.range("pixels").index}
    both_ways = parse_mask("causal | (modality == pixels & same_item)", numbers)
    objective = NextTokenConfig().build(words)
    reads = SimpleNamespace(mask=both_ways, heads={"tokens": None})
    objective.check_model(reads)  # type: ignore[arg-type]
    writes = SimpleNamespace(mask=both_ways, heads={"tokens": None, "pixels": None})
    with pytest.raises(UserError, match="shows a target of 'pixels' what it predicts"):
        objective.check_model(writes)  # type: ignore[arg-type]


def test_a_model_that_sees_its_targets_has_no_score() -> None:
    model = make(mask=IMAGES)
    score = lambda *segments: sequence_nll(model, VOCABULARY, [list(segments)])
    assert score(text(4))[0]["text"][1] == 5
    assert score(image(), text(4))
    with pytest.raises(UserError, match="shows 'image' what comes after: .* nor scored"):
        score(text(2, "condition"), image("target"))


def test_what_may_be_generated_gets_the_logits_of_the_whole_pass() -> None:
    """Image to text, greedy: each token is the best of a pass over all before it."""
    model = make(mask=IMAGES).eval()
    given = [[image()], [image(), text(4, "condition")]]
    made = generate_tokens(model, VOCABULARY, given, "text", temperature=0.0, max_tokens=5)
    first = VOCABULARY.range("text").first
    for prompt, found in zip(given, made, strict=True):
        assert len(found)
        batch = to_batch([[[*prompt, Segment("text", found)]]], VOCABULARY)
        with torch.no_grad():
            logits = model(batch, loss=False, heads=["tokens"]).heads["tokens"].dist.logits
        codes = logits[: len(found), first : first + 11]
        assert codes.argmax(-1).tolist() == found.tolist()


def test_only_what_is_read_is_carried() -> None:
    """A causal pass has no named field; a mask of items has theirs alone."""
    for mask, wanted in (("causal", set()), ("causal | (same_item & prefix)", {"item", "prefix"})):
        model, found = make(mask=mask), []
        model.backbone.register_forward_pre_hook(
            lambda m, args, found=found: found.append({*args[1].layout.fields.extra})
        )
        model(to_batch([[[image(), text(2)]]], VOCABULARY))
        assert found == [wanted]
