"""Tokenizers with chat templates of the kinds that people have, and small tables of talks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.batching.document import document_tokens
from mm.data.chat.loss import sample_segments
from mm.data.chat.show import learnt_tokens
from mm.data.shards.reader import ShardSet
from mm.tokenizers.text.bpe import BpeConfig, BpeTokenizer
from mm.tokenizers.text.hf import HfConfig, HfTokenizer

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
BRACKETS = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\
[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}\
 {{ m.content | trim }}{{ eos_token }}{% else %}\
{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
HEADERS = """{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|body|>

{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|body|>

{% endif %}"""
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
PARTS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}\
{% if p.type == 'image' %}<|vision|><|pad|><|/vision|>{% else %}{{ p.text }}{% endif %}{% endfor %}\
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
IM = ("<|im_start|>", "<|im_end|>")
# name -> template, special tokens, what a turn begins after, what ends it
TEMPLATES = {
    "chatml": (CHATML, IM, "<|im_start|>assistant\n", "<|im_end|>"),
    "brackets": (BRACKETS, ("<s>", "</s>"), " [/INST]", "</s>"),
    "headers": (
        HEADERS,
        ("<s>", "<|header|>", "<|body|>", "<|eot|>"),
        "<|header|>assistant<|body|>\n\n",
        "<|eot|>",
    ),
    "thinking": (
        THINKING,
        IM,
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "parts": (
        PARTS,
        (*IM, "<|vision|>", "<|pad|>", "<|/vision|>"),
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
}


def bpe() -> BpeTokenizer:
    """A tokenizer of this project, without special tokens and template."""
    return BpeConfig.smallest_tokenizer()


def hf(name: str = "chatml", template: str | None = None) -> HfTokenizer:
    """A tokenizer that came with a model and brings a template."""
    source, special = TEMPLATES[name][:2]
    inner = bpe().inner
    inner.add_special_tokens(list(special))
    ids = {word: inner.token_to_id(word) for word in special}
    config = HfConfig(
        vocab_size=inner.get_vocab_size(),
        bos=ids.get("<s>"),
        eos=[ids[word] for word in ("</s>", "<|im_end|>", "<|eot|>") if word in ids],
    )
    source = source if template is None else template
    return HfTokenizer(config, inner.to_str().encode(), {"chat_template.jinja": source.encode()})


def talk(i: int = 0, turns: int = 1, **more: Any) -> dict[str, Any]:
    """A row of OpenAI's shape."""
    messages = []
    for k in range(turns):
        messages.append({"role": "user", "content": f"what is {i} + {k}?"})
        messages.append({"role": "assistant", "content": f"it is {i + k}."})
    return {"messages": messages, **more}


def jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows; a str stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def learnt(root: Path, tokenizer: Any, i: int = 0) -> list[str]:
    """What is learnt of sample i, run by run; the end of a segment is ■."""
    shards = ShardSet.open(root)
    assert shards.vocabulary is not None
    document = document_tokens(sample_segments(shards, i, shards.vocabulary), shards.vocabulary)
    own, r = learnt_tokens(document), shards.vocabulary.range("text")
    out, run = [], []
    for token, yes in [*zip(document.ids.tolist(), own.tolist(), strict=True), (0, False)]:
        if yes:
            run.append(token)
        elif run:
            codes = np.array([t - r.first for t in run if r.first <= t < r.stop], np.int32)
            text = tokenizer.inner.decode(codes.tolist(), skip_special_tokens=False)
            out.append(text + "■" * (r.end in run))
            run = []
    return out
