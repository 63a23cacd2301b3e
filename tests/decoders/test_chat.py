"""A model that learnt a conversation answers it, stops, and is asked as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_toys import bpe, hf, jsonl, talk
from start_toys import values

from mm.data.chat.template import FILE
from mm.data.pack.job import pack
from mm.decoders.base import Session
from mm.decoders.chat import Chat, after
from mm.errors import UserError
from mm.run import Run
from mm.trainer.loop import train
from mm.vocabulary import Vocabulary


def learn_by_heart(root: Path, tokenizer: Any, steps: int) -> Chat:
    """A tiny model after ``steps`` steps on one conversation."""
    tokenizer.save(root / "tokenizers" / "text")
    src = jsonl(root / "talks.jsonl", [talk(3)])
    pack(src, root / "tokens", tokenizers=root / "tokenizers", progress=False)
    data = {"seq_len": 256, "batch_size": 2}
    optimizer = {"kind": "adamw", "lr": 0.01}
    run = values(root, root / "runs", steps=steps, data=data, stage={"optimizer": optimizer})
    run["tokenizers"] = {"text": str(root / "tokenizers" / "text")}
    run["model"]["d_model"] = 32
    made = Run.model_validate(run)
    train(made)
    return Chat.from_pretrained(made.folder)


@pytest.mark.parametrize("name", ["own", "chatml"])
def test_what_was_learnt_is_answered_and_ends_by_itself(name: str, tmp_path: Path) -> None:
    chat = learn_by_heart(tmp_path, bpe() if name == "own" else hf(name), 50)
    asked = [talk(3)["messages"][:1]] * 2
    said = chat.answer(asked, temperature=0, max_tokens=40)
    assert said == ["it is 3."] * 2
    (tmp_path / "runs" / "run" / "model" / FILE).unlink()
    if name == "chatml":  # the template of its tokenizer is the same one
        again = Chat.from_pretrained(tmp_path / "runs" / "run")
        assert again.answer(asked, temperature=0, max_tokens=40) == said
    else:
        with pytest.raises(UserError, match="no chat template"):
            Chat.from_pretrained(tmp_path / "runs" / "run")
    image = [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]
    with pytest.raises(UserError, match="this model reads no image, only text"):
        chat.segments(image)
    with pytest.raises(UserError, match="unknown role 'usr'"):
        chat.segments([{"role": "usr", "content": "a"}])


def test_nothing_but_the_end_comes_after_a_stop() -> None:
    words = Vocabulary().add(bpe().spec)
    r = words.range("text")
    rows = torch.tensor([[5, 7, 8], [7, 8, 5]]) + r.first
    session = Session(words, "text", torch.tensor([3, 3]), torch.tensor([9, 9]), 3, rows)
    logits = torch.randn(2, words.size)
    found = after([7, 8])(logits, session)
    assert torch.isfinite(found[0]).nonzero().tolist() == [[r.end]]
    assert torch.equal(found[1], logits[1])
    short = Session(words, "text", torch.tensor([1]), torch.tensor([9]), 1, rows[:1, :1])
    assert torch.equal(after([7, 8])(logits[:1], short), logits[:1])
