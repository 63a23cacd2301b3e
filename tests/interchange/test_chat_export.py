"""The chat template of a training goes out with the model, where its tokenizer brings another."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_toys import CHATML, bpe, hf

from mm.data.chat.choose import template_of
from mm.data.chat.template import JINJA, OWN
from mm.interchange.write import write_template


def test_a_template_is_exported_where_it_is_not_the_tokenizers_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, file = hf("chatml"), tmp_path / JINJA
    write_template(tmp_path, None, tokenizer)
    write_template(tmp_path, template_of(tokenizer), tokenizer)
    assert not file.exists(), "the tokenizer's files carry it"
    other = tmp_path / "other.jinja"
    other.write_text(CHATML.replace("\n{{", "\n\n{{").replace("assistant\n", "assistant\n\n"))
    write_template(tmp_path, template_of(tokenizer, other), tokenizer)
    assert file.read_text() == other.read_text()
    file.unlink()
    own = template_of(tokenizer, Path(OWN))
    assert own.stop == "<|im_end|>", "the token that ends a text of this model"
    write_template(tmp_path, own, tokenizer)
    assert file.read_text() == own.source
    file.unlink()
    write_template(tmp_path, template_of(bpe()), tokenizer)
    assert not file.exists() and "no chat template is exported" in caplog.text
