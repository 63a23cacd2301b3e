"""Chat templates: strangers' ones are bounded, and what they do is found out before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_toys import CHATML, TEMPLATES, bpe, hf, talk

from mm.data.chat.choose import template_of
from mm.data.chat.conversation import Conversation, Message, read_row
from mm.data.chat.sandbox import RefusedConversation, Sandbox, TemplateError
from mm.data.chat.template import END, ChatTemplate, MediaPart, TextPart
from mm.data.modalities.base import BadSample
from mm.errors import UserError


def render(source: str, seconds: int = 1) -> str:
    sandbox = Sandbox(source, seconds)
    try:
        return sandbox.render([{"role": "user", "content": "x"}], {}, [(1, False)])[0]
    finally:
        sandbox.close()


HOSTILE = {
    "loops for ever": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "does not end",
    ),
    "computes for ever while it is compiled": ("{{ 9 ** (9 ** 9) }}", "does not end"),
    "asks for a terabyte": ("{{ 'a' * (10 ** 12) }}", "more memory"),
    "formats a terabyte": ("{{ '%999999999999d' % 1 }}", "."),
    "writes without end": (
        "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "more than 8,000,000 characters",
    ),
    "is no template": ("{% if %}", "no Jinja template .line 1"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_template_is_stopped_that(case: str) -> None:
    source, why = HOSTILE[case]
    with pytest.raises((TemplateError, RefusedConversation), match=why):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_reaches_and_changes_nothing(source: str) -> None:
    with pytest.raises(RefusedConversation):
        render(source)


def test_the_sandbox_goes_on_after_a_refusal_and_starts_anew_after_a_death() -> None:
    sandbox = Sandbox("{{ raise_exception('no') if messages | length > 1 else 'a' * 2 }}", 5)
    one, two = [{"role": "user"}], [{"role": "user"}] * 2
    with pytest.raises(RefusedConversation, match="^no$"):
        sandbox.render(two, {}, [(2, False)])
    assert sandbox.render(one, {}, [(1, True)]) == ["aa"]
    assert sandbox._child is not None
    sandbox._child.kill()
    with pytest.raises(TemplateError, match="signal 9"):
        sandbox.render(one, {}, [(1, True)])
    assert sandbox.render(one, {}, [(1, True)]) == ["aa"]
    sandbox.close()


def test_generation_blocks_and_breaks_of_others_are_read() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}"
    assert render(source + "{% endfor %}") == "x"


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_does_is_found_out(name: str) -> None:
    _, _, header, stop = TEMPLATES[name]
    found = template_of(hf(name))
    assert (found.header, found.stop) == (header, stop)
    assert found.arguments == ({"enable_thinking": False} if name == "thinking" else {})
    assert ("image" in found.places) == (name == "parts")


def test_a_day_is_told_to_templates_that_need_one_and_to_no_other() -> None:
    needs = "{{ strftime_now('%d %b %Y') }}" + CHATML
    asks = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + CHATML
    found = [template_of(hf("chatml", source)) for source in (needs, asks)]
    assert [t.arguments for t in found] == [{"today": "2024-07-26"}, {}]
    (part,), (other,) = (pieces(t, talk()) for t in found)
    assert part.pieces[0][0].startswith("26 Jul 2024<|im_start|>user")
    assert other.pieces[0][0].startswith("<|im_start|>user")


def pieces(template: ChatTemplate, row: dict[str, Any], prompt: bool = False) -> list[Any]:
    conversation = read_row(row, {"messages": "messages"})
    return template.parts(conversation, prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_the_assistant_is_learnt_with_what_stops_it(name: str) -> None:
    stop = TEMPLATES[name][3]
    template = template_of(hf(name))
    (part,) = pieces(template, talk(4, turns=2))
    assert isinstance(part, TextPart) and not part.end
    own = [text for text, learnt in part.pieces if learnt]
    space = " " if name == "brackets" else ""
    wanted = [f"{space}it is 4.{stop}", f"{space}it is 5.{stop}"]
    # A server that asks for no thought begins after an empty one, which a history does not show.
    assert own == (wanted[1:] if name == "thinking" else wanted)
    assert part.pieces[-1][1], "what follows the last turn is left out"


def test_thoughts_are_learnt_where_a_table_has_them_and_empty_ones_are_not() -> None:
    row = talk(4, turns=2)
    (quiet,) = pieces(template_of(hf("thinking")), row)
    assert [t for t, learnt in quiet.pieces if learnt] == ["it is 5.<|im_end|>"]
    row["messages"][3]["reasoning_content"] = "4 and 1"
    (part,) = pieces(template_of(hf("thinking"), thinking=True), row)
    said = "<think>\n4 and 1\n</think>\n\nit is 5.<|im_end|>"
    assert [t for t, learnt in part.pieces if learnt] == [said], "the first shows no thought now"
    with pytest.raises(BadSample, match="another text before it than it asks"):
        pieces(template_of(hf("thinking")), row)


def test_the_default_ends_a_segment_with_each_turn() -> None:
    template = template_of(bpe())
    assert (template.stop, template.header) == (END, "\n\n### Assistant\n")
    first, second = pieces(template, talk(4, turns=2))
    assert first.pieces == (
        ("### User\nwhat is 4 + 0?\n\n### Assistant\n", False),
        ("it is 4.", True),
    )
    assert first.end and second.end and second.pieces[1] == ("it is 5.", True)


def test_a_prompt_is_what_stands_before_the_answer() -> None:
    for tokenizer in (bpe(), hf("chatml"), hf("brackets"), hf("headers")):
        template = template_of(tokenizer)
        messages = read_row(talk(4, turns=2), {"messages": "messages"}).messages
        asked = template.parts(Conversation(messages[:3]), prompt=True)
        trained = template.parts(Conversation(messages))
        text = lambda parts: "".join(t for p in parts for t, _ in p.pieces)
        answer = trained[-1].pieces[-1][0]
        assert text(trained) == text(asked) + answer


def test_media_stand_where_the_template_puts_them() -> None:
    content = [{"type": "text", "text": "see"}, {"type": "image", "image": "a.png"}]
    row = talk()
    row["messages"][0]["content"] = [*content, {"type": "text", "text": "that"}]
    for tokenizer in (hf("parts"), hf("chatml"), bpe()):
        before, media, after = pieces(template_of(tokenizer), row)
        assert isinstance(media, MediaPart) and media.media.value == "a.png" and not media.learnt
        assert before.pieces[-1][0].endswith("see") and after.pieces[0][0].startswith("that")
        assert "<|pad|>" not in before.pieces[-1][0] + after.pieces[0][0]


def test_what_follows_the_last_answer_is_left_out_with_its_media() -> None:
    row = talk()
    shown = [{"type": "text", "text": "and"}, {"type": "image", "image": "a.png"}]
    row["messages"].append({"role": "user", "content": shown})
    for tokenizer in (hf("parts"), bpe()):
        (part,) = pieces(template_of(tokenizer), row)
        assert "and" not in "".join(t for t, _ in part.pieces)


REFUSED = {
    "ends no turn": (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "ends no turn of the assistant",
    ),
    "asks otherwise than it answers": (
        CHATML.replace("<|im_start|>assistant\n", "<|im_start|>bot\n"),
        "generation prompt is not what its own turns begin with",
    ),
    "writes tokens that are none": (
        CHATML.replace("<|im_start|>", "<|start|>"),
        "writes <.start.>, which the tokenizer has no id for",
    ),
    "writes tokens that are none between wide bars": (
        "<\uff5cUser\uff5c>" + CHATML,
        "writes <.User.>, which the tokenizer has no id for",
    ),
    "leaves out what is said": ("{{ eos_token }}", "does not stand in its text"),
    "fails": ("{{ raise_exception('never') }}", "cannot write a plain conversation .never"),
    "is no Jinja": ("{% if %}", "no Jinja template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_is_refused_that(case: str, tmp_path: Path) -> None:
    source, why = REFUSED[case]
    with pytest.raises(UserError, match=why) as caught:
        template_of(hf("chatml", source))
    assert "--template" in str(caught.value) and "\n" not in str(caught.value)
    file = tmp_path / "mine.jinja"
    file.write_text(source)
    with pytest.raises(UserError, match=rf"mine\.jinja: .*{why}"):
        template_of(hf("chatml"), file)


def test_a_template_of_special_tokens_needs_a_tokenizer_that_has_them(tmp_path: Path) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    with pytest.raises(UserError, match="no id for"):
        template_of(bpe(), file)


@pytest.mark.parametrize("said", ["<|im_end|> more", "a <|im_start|>system", f"a{END}"])
def test_what_the_template_writes_cannot_be_said(said: str) -> None:
    row = talk()
    row["messages"][0]["content"] = said
    with pytest.raises(BadSample, match="message 0 holds"):
        pieces(template_of(hf("chatml")), row)


def test_a_refused_conversation_says_why() -> None:
    row = talk()
    row["messages"].insert(0, {"role": "system", "content": "be kind"})
    with pytest.raises(BadSample, match="the template refuses it: only user and assistant"):
        pieces(template_of(hf("brackets")), row)


def test_saved_and_loaded_it_is_the_same_and_an_edited_one_is_refused(tmp_path: Path) -> None:
    template = template_of(hf("headers"))
    template.save(tmp_path)
    assert ChatTemplate.load(tmp_path) == template
    assert ChatTemplate.load(tmp_path / "none") is None
    file = tmp_path / "chat.json"
    file.write_text(file.read_text().replace("eot", "eox"))
    with pytest.raises(UserError, match="it was edited"):
        ChatTemplate.load(tmp_path)
    file.write_text("{")
    with pytest.raises(UserError, match="no chat template"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("name", ["chatml", "brackets", "headers", "parts"])
def test_ids_are_those_of_transformers(name: str) -> None:
    """Of a whole conversation, and of the prompt that `transformers` or vLLM would make of it."""
    transformers = pytest.importorskip("transformers")
    from mm.data.chat.encode import ChatEncoder, text_bytes
    from mm.data.pack.encode import Item

    tokenizer = hf(name)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.inner,
        bos_token="<s>" if "<s>" in TEMPLATES[name][1] else None,
        eos_token=TEMPLATES[name][3],
        chat_template=TEMPLATES[name][0],
    )
    row, template = talk(7, turns=3), template_of(tokenizer)
    messages = read_row(row, {"messages": "messages"}).messages

    def ids(n: int, prompt: bool) -> list[int]:
        (part,) = template.parts(Conversation(messages[:n]), prompt)
        encoder = ChatEncoder({"text": tokenizer})
        (found,) = encoder.encode([Item({"text": text_bytes(part, [])}, None)])
        begin = [tokenizer.config.bos] if template.bos else []  # a segment begins with it
        return begin + found.encoded["text"].ids.tolist()

    wanted = theirs.apply_chat_template(row["messages"], tokenize=False)
    whole = theirs(wanted, add_special_tokens=False)["input_ids"]
    assert ids(6, False) == whole[: len(ids(6, False))]
    asked = theirs.apply_chat_template(
        row["messages"][:5], tokenize=False, add_generation_prompt=True
    )
    assert ids(5, True) == theirs(asked, add_special_tokens=False)["input_ids"]


def test_a_message_without_content_is_read_as_empty() -> None:
    assert Message("user", ()).empty and Message("user", (" \n",)).empty
    assert not Message("assistant", (), {"tool_calls": [1]}).empty


def test_a_template_that_writes_half_a_character_is_refused() -> None:
    with pytest.raises(TemplateError, match="half a character"):
        Sandbox(r"{{ '\ud800' }}", 5).render([], {}, [(0, False)])
