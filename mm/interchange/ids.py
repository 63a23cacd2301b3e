"""How a checkpoint's ids stand in ours. V ids of the checkpoint, D model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor, nn

from mm.errors import UserError
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.text.bpe import BpeTokenizer
from mm.tokenizers.text.hf import FILE, HfConfig, HfTokenizer
from mm.vocabulary import Range, Vocabulary

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


class Ids(NamedTuple):
    """The checkpoint's tokenizer, and which of our rows its ids take.

    ``appended``: our begin and end are its last two ids; else they became rows of its own.
    """

    tokenizer: HfTokenizer
    span: Range
    appended: bool

    @property
    def config(self) -> HfConfig:
        return self.tokenizer.config

    def own(self) -> Tensor:
        """`(V,)` our id of each of the checkpoint's."""
        codes = torch.arange(self.span.first, self.span.stop)
        if not self.appended:
            return codes
        return torch.cat([codes, torch.tensor([self.span.begin, self.span.end])])

    def fold(self, table: Tensor, embeds: bool, tied: bool) -> Tensor:
        """`(V, D)` rows of the checkpoint out of ours.

        What training did to begin and end goes to the checkpoint's own ids: begin counts where it
        is read, end where it is written. Where one row is both and tied, what is written counts.
        """
        if self.appended:
            return table[self.own()]
        begin, end = table[self.span.begin], table[self.span.end]
        own, rows = table[self.span.first : self.span.stop], None
        first = next(iter(self.config.eos), None)
        starts = self.config.bos if self.config.bos is not None else first
        for id, row, counts in ((starts, begin, embeds), (first, end, tied or not embeds)):
            if id is not None and counts and not own[id].equal(row):
                rows = own.clone() if rows is None else rows
                rows[id] = row
        return own if rows is None else rows

    def fold_model(self, model: nn.Module) -> None:
        """`fold` of a built model, which then gives the checkpoint's logits."""
        if self.appended:
            return
        embedder: Any = model.get_submodule("embedder")
        head: Any = model.get_submodule("heads.tokens")
        with torch.no_grad():
            for module, embeds in ((embedder, True), (head, False)):
                weight = module.get_parameter("weight")
                weight[self.span.first : self.span.stop] = self.fold(weight, embeds, head.tied)


def ids_of(folder: Path, vocabulary: Vocabulary) -> Ids:
    """The ids of a saved model of one modality of ids. Raises UserError where it is no text."""
    (modality,) = (spec.modality for spec in vocabulary.ranges if not spec.continuous)
    place = folder / "tokenizers" / modality
    tokenizer = load_tokenizer(place) if place.is_dir() else None
    span = vocabulary.range(modality)
    if isinstance(tokenizer, HfTokenizer):
        return Ids(tokenizer, span, False)
    if isinstance(tokenizer, BpeTokenizer):
        return Ids(with_borders(tokenizer), span, True)
    if tokenizer is None:
        raise UserError(f"{place}: the model was saved without its tokenizer; copy it there")
    kind = type(tokenizer).__name__
    raise UserError(f"{place}: only kinds bpe and hf have an equal in {FILE}, not a {kind}")


def with_borders(bpe: BpeTokenizer) -> HfTokenizer:
    """A BPE of ours whose documents begin and end with ids of their own, behind all others.

    A text that spells them stays text: ``split_special_tokens``.
    """
    inner = Tokenizer.from_str(bpe.inner.to_str())
    size = inner.get_vocab_size()
    names = [name for name in (BEGIN, END) if inner.token_to_id(name) is None]
    inner.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    if inner.get_vocab_size() != size + 2:
        raise UserError(f"{bpe.config.modality}: the BPE has a token {BEGIN} or {END} of its own")
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, size)],
    )
    beside = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    card = {"tokenizer_config.json": (json.dumps(beside, indent=2) + "\n").encode()}
    config = HfConfig(vocab_size=size + 2, bos=size, eos=[size + 1])
    return HfTokenizer(config, inner.to_str(pretty=True).encode(), card)
